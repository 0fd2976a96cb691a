"""Where memory is short, what would help most is named: nothing that is set, nothing refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl_skd import memory_remedies as remedy
from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.memory import GIB, Forecast, forecast
from axolotl_skd.memory_of_ranks import Division, on_each_rank
from axolotl_skd.memory_remedies import (
    remedies,
    taken_of_student,
    taken_of_teacher,
    warn_before_loading,
    warn_of_memory,
)
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.types import Source
from axolotl_skd.sharding import Engine
from tests.rollout.tiny import tiny_model
from tests.test_memory import CPU, SHAPE

CUDA = torch.device("cuda:1")


def test_the_most_helpful_come_first() -> None:
    parts = {"student": 1, "KV caches": 9, "teacher": 8, "activations": 5}
    assert remedies(parts) == [remedy.OTHER_DEVICE, remedy.IN_FLIGHT, remedy.CHECKPOINTING]
    without = {remedy.OTHER_DEVICE, remedy.OFFLOAD}
    assert remedies(parts, without)[0] == remedy.FOUR_BIT_TEACHER


def test_what_one_saves_the_next_cannot() -> None:
    """An adapter leaves no optimizer states to speak of: an 8-bit optimizer would add nothing."""
    parts = {"student": 1, "optimizer": 12, "gradients": 4, "logits": 1}
    assert remedies(parts) == [remedy.QLORA]


def test_nothing_is_named_that_saves_nothing() -> None:
    assert remedies({"student": 1}, {remedy.QLORA}) == []


@pytest.mark.parametrize(
    ("keys", "engine", "free"),
    [
        ({}, Engine.WHOLE, {remedy.FOUR_BIT_TEACHER, remedy.OTHER_DEVICE, remedy.OFFLOAD}),
        ({"load_in_4bit": True}, Engine.WHOLE, {remedy.OTHER_DEVICE}),
        ({"device": "cuda:1"}, Engine.WHOLE, {remedy.FOUR_BIT_TEACHER}),
        ({"device_map": "auto"}, Engine.WHOLE, {remedy.FOUR_BIT_TEACHER}),
        ({"offload": True}, Engine.WHOLE, set()),
        ({"student_base": True, "base_model": None}, Engine.WHOLE, set()),
        ({}, Engine.ZERO_3, {remedy.FOUR_BIT_TEACHER, remedy.BY_LAYERS}),
        ({"gather": "layers"}, Engine.FSDP_2, {remedy.FOUR_BIT_TEACHER}),
    ],
)
def test_what_the_teacher_can_still_do(
    keys: dict[str, Any], engine: Engine, free: set[str]
) -> None:
    of_teacher = {
        remedy.FOUR_BIT_TEACHER,
        remedy.OTHER_DEVICE,
        remedy.OFFLOAD,
        remedy.BY_LAYERS,
    }
    teacher = TeacherConfig(**{"base_model": "some/teacher", **keys})
    assert of_teacher - taken_of_teacher(teacher, engine) == free


def test_what_the_student_can_still_do() -> None:
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    student = tiny_model("llama", seed=1)
    assert taken_of_student(args, SHAPE, student, Engine.WHOLE) == set()
    assert taken_of_student(args, SHAPE, student, Engine.ZERO_3) == {remedy.QLORA}
    shape = replace(SHAPE, rows_in_flight=1, checkpointing=True, optimizer="adamw_bnb_8bit")
    adapted = get_peft_model(student, LoraConfig(target_modules=["q_proj"])).get_base_model()
    args = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert taken_of_student(args, shape, adapted, Engine.WHOLE) == {
        remedy.LORA,
        remedy.OPTIMIZER,
        remedy.CHECKPOINTING,
        remedy.MICRO_BATCH,
        remedy.ACCUMULATION,
        remedy.IN_FLIGHT,
    }


def test_a_device_too_small_is_said_with_what_helps_most(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = {"student": 1 * GIB, "KV caches": 4 * GIB, "logits": 2 * GIB, "teacher": 2 * GIB}
    what = Forecast(CPU, peak, {}, {CUDA: 9 * GIB})
    sizes = {CPU: 10 * GIB, CUDA: 8 * GIB}
    monkeypatch.setattr(remedy, "device_memory", sizes.__getitem__)
    warn_of_memory(replace(what, elsewhere={}))
    assert not caplog.records
    sizes[CPU] = 9.9 * GIB  # a rough sum this near to all of it
    warn_of_memory(what)
    here, there = [record.getMessage() for record in caplog.records]
    assert "9.0 GiB are predicted to be needed on cpu, which has 9.9" in here
    assert "; ".join([remedy.IN_FLIGHT, remedy.OTHER_DEVICE, remedy.ACCUMULATION]) in here
    assert f"needed on cuda:1, which has 8.0: this may run out of memory. {'What'}" in there
    assert f"{remedy.OTHER_DEVICE}." in there
    assert remedy.OFFLOAD not in there, "in a rollout it is there all the same"


def test_weights_without_room_are_said_before_they_are_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_before_loading(9 * GIB, CUDA, 9 * GIB, ())
    warn_before_loading(9 * GIB, CPU, None, ())
    assert not caplog.records
    warn_before_loading(9 * GIB, CUDA, 8 * GIB, {remedy.OTHER_DEVICE})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "9.0 GiB are predicted to be needed on cuda:1, which has 8.0" in said
    assert said.endswith(f"What would help most: {remedy.FOUR_BIT_TEACHER}.")


def test_every_part_that_can_be_large_has_a_remedy() -> None:
    student = CausalLM(tiny_model("llama", seed=1))
    teacher = CausalLM(tiny_model("llama", seed=2))
    shape = replace(SHAPE, reads_data=True, source=Source.INTERLEAVED, activation_bytes=2)
    for engine in Engine:
        division = Division(engine, 4, teacher=True, by_layer=False)
        alone = forecast(student, teacher, shape)
        predicted = on_each_rank(alone, student, teacher, shape, division)
        for parts in (predicted.rollout, predicted.training):
            large = {part for part, size in parts.items() if size}
            # Whole for a rollout: nothing but a smaller model or other hardware helps.
            hopeless = {"gathered student"}
            assert all(remedies({part: 1}) for part in large - hopeless)
