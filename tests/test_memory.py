"""The memory forecast: exact where it can be (weights, caches, kept states), monotone elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from axolotl_skd.memory import (
    GIB,
    Forecast,
    PeakMemory,
    StepShape,
    device_memory,
    forecast,
    kv_bytes,
    remedies,
    stored_bytes,
    warn_of_memory,
    weight_bytes,
)
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM, FullLogitsLM
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, SamplingParams, Source
from tests.rollout.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")
SHAPE = StepShape(
    window_rows=6,
    rows_in_flight=4,
    batch_rows=2,
    prompt_tokens=9,
    new_tokens=7,
    row_tokens=16,
    reads_data=False,
    source=Source.INTERLEAVED,
    checkpointing=False,
    activation_bytes=4,
    optimizer="adamw_torch",
)


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLM, CausalLM]:
    student = CausalLM(tiny_model("llama", seed=1))
    teacher = CausalLM(tiny_model("llama", seed=2, hidden_size=48, num_layers=3))
    teacher.model.requires_grad_(False)
    return student, teacher


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_the_real_cache(family: str, dtype: torch.dtype) -> None:
    lm = CausalLM(tiny_model(family, seed=1).to(dtype))
    cache = lm.new_cache(3, 10)
    with torch.no_grad():
        lm.prefill(torch.ones(3, 4, dtype=torch.long), torch.arange(3), cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * 10 * kv_bytes(lm)


def test_kept_states_are_those_of_a_real_rollout(pair: tuple[CausalLM, CausalLM]) -> None:
    prompts = Prompts(
        tuple(torch.ones(9, dtype=torch.long) for _ in range(6)),
        row_streams(0, 0, torch.arange(6)),
        torch.full((6,), 7),
    )
    params = SamplingParams(3, 300, 1.0, 0.9, 1.0, 0.9, ())
    with torch.no_grad():
        rollout = RolloutEngine(*pair).interleave(prompts, params)
    parts = forecast(*pair, SHAPE)
    assert parts.training["teacher states"] == rollout.teacher_hidden.nbytes
    assert parts.rollout["teacher states"] == rollout.teacher_hidden.nbytes


def test_weights_gradients_and_optimizer(pair: tuple[CausalLM, CausalLM]) -> None:
    student, teacher = pair
    size = 4 * sum(p.numel() for p in student.model.parameters())
    parts = forecast(student, teacher, SHAPE).training
    assert weight_bytes(student) == parts["student"] == parts["gradients"] == size
    assert parts["optimizer"] == 2 * size
    assert parts["teacher"] == weight_bytes(teacher)
    sgd = forecast(student, teacher, replace(SHAPE, optimizer="sgd"))
    assert sgd.training["optimizer"] == 0
    assert forecast(student, None, SHAPE).training["teacher"] == 0


def test_a_frozen_student_part_needs_no_gradient() -> None:
    student = CausalLM(tiny_model("llama", seed=1))
    student.model.requires_grad_(False)
    student.model.model.norm.weight.requires_grad_(True)
    parts = forecast(student, None, SHAPE).training
    assert parts["gradients"] == 4 * student.model.model.norm.weight.numel()
    assert parts["head gradient"] == 0


@pytest.mark.parametrize(
    ("change", "phase", "part"),
    [
        ({"rows_in_flight": 8}, "rollout", "KV caches"),
        ({"new_tokens": 70}, "rollout", "KV caches"),
        ({"row_tokens": 70}, "training", "activations"),
        ({"prompt_tokens": 90}, "rollout", "prompts"),
        ({"window_rows": 60}, "training", "teacher states"),
        ({"batch_rows": 20}, "training", "activations"),
        ({"activation_bytes": 8}, "training", "activations"),
    ],
)
def test_more_of_it_needs_more(
    pair: tuple[CausalLM, CausalLM], change: dict[str, int], phase: str, part: str
) -> None:
    before, after = (forecast(*pair, shape) for shape in (SHAPE, replace(SHAPE, **change)))
    assert getattr(after, phase)[part] > getattr(before, phase)[part]


def test_checkpointing_needs_less(pair: tuple[CausalLM, CausalLM]) -> None:
    less = forecast(*pair, replace(SHAPE, checkpointing=True)).training["activations"]
    assert less < forecast(*pair, SHAPE).training["activations"]


def test_without_a_rollout_nothing_is_kept(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(*pair, replace(SHAPE, source=Source.DATASET))
    assert not parts.rollout
    assert parts.training["teacher states"] == 0
    assert parts.phase == "training"


def test_only_models_that_sample_have_caches(pair: tuple[CausalLM, CausalLM]) -> None:
    student, teacher = map(kv_bytes, pair)
    slots = SHAPE.rows_in_flight * (SHAPE.prompt_tokens + SHAPE.new_tokens)
    for source, per_slot in [
        (Source.STUDENT, student),
        (Source.TEACHER, teacher),
        (Source.INTERLEAVED, student + teacher),
    ]:
        parts = forecast(*pair, replace(SHAPE, source=source))
        assert parts.rollout["KV caches"] == slots * per_slot
        kept = source is Source.INTERLEAVED
        assert bool(parts.training["teacher states"]) == kept


def test_full_logits_count(pair: tuple[CausalLM, CausalLM]) -> None:
    full = FullLogitsLM(pair[0].model)
    parts = [forecast(lm, pair[1], SHAPE).training["activations"] for lm in (full, pair[0])]
    rows = SHAPE.batch_rows * SHAPE.row_tokens
    assert parts[0] - parts[1] == 3 * rows * full.state_size * SHAPE.activation_bytes


def test_weights_cast_for_a_rollout_count(pair: tuple[CausalLM, CausalLM]) -> None:
    half = forecast(*pair, replace(SHAPE, activation_bytes=2)).rollout["cast weights"]
    assert half == weight_bytes(pair[0]) // 2
    assert forecast(*pair, SHAPE).rollout["cast weights"] == 0


def test_the_peak_is_the_larger_phase() -> None:
    what = Forecast(
        CPU,
        {"student": 1 * GIB, "KV caches": 3 * GIB},
        {"student": 1 * GIB, "optimizer": GIB // 2},
        {},
    )
    assert (what.phase, what.peak) == ("rollout", 4 * GIB)
    assert str(what) == "predicted peak 4.00 GiB, in the rollout (student 1.00, KV caches 3.00)"
    assert replace(what, rollout={}).phase == "training"
    spread = replace(what, elsewhere={torch.device("cuda:1"): 5 * GIB})
    assert str(spread) == f"{what}; 5.00 GiB on cuda:1"


def test_the_student_as_its_own_teacher_is_counted_once(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(pair[0], CausalLM(pair[0].model), SHAPE)
    assert parts.training["teacher"] == 0
    assert (
        parts.rollout["KV caches"]
        == 2 * forecast(pair[0], None, replace(SHAPE, source=Source.STUDENT)).rollout["KV caches"]
    )


def test_an_offloaded_teacher_leaves_its_head(pair: tuple[CausalLM, CausalLM]) -> None:
    whole, head = weight_bytes(pair[1]), pair[1].head_module.weight.nbytes
    parts = forecast(*pair, SHAPE, offloaded=True)
    assert (parts.rollout["teacher"], parts.training["teacher"]) == (whole, head)
    mixed = forecast(*pair, replace(SHAPE, reads_data=True), offloaded=True)
    assert mixed.training["teacher"] == whole


def test_a_teacher_that_writes_and_goes(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(*pair, replace(SHAPE, source=Source.TEACHER), released=True)
    assert parts.rollout["teacher"] == weight_bytes(pair[1])
    slots = SHAPE.rows_in_flight * (SHAPE.prompt_tokens + SHAPE.new_tokens)
    assert parts.rollout["KV caches"] == slots * kv_bytes(pair[1])
    assert parts.training["teacher"] == 0


def test_a_teacher_elsewhere_is_counted_there(pair: tuple[CausalLM, CausalLM]) -> None:
    teacher = CausalLM(tiny_model("llama", seed=2).to("meta"))
    parts = forecast(pair[0], teacher, SHAPE)
    assert parts.training["teacher"] == 0
    slots = SHAPE.rows_in_flight * (SHAPE.prompt_tokens + SHAPE.new_tokens)
    needed = weight_bytes(teacher) + slots * kv_bytes(teacher)
    assert parts.elsewhere == {torch.device("meta"): needed}


def test_quantised_weights_count_as_they_are_stored() -> None:
    weight = nn.Linear(64, 32, dtype=torch.bfloat16)
    quantize_(weight, Int8WeightOnlyConfig())
    # A byte a number, and a scale and a zero point a row, where bf16 has two bytes a number.
    assert 64 * 32 < stored_bytes(weight.weight) <= 64 * 32 + 32 * 16


def test_a_device_too_small_is_said_with_what_helps_most(
    pair: tuple[CausalLM, CausalLM],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = {"student": 1 * GIB, "KV caches": 4 * GIB, "logits": 2 * GIB, "teacher": 3 * GIB}
    what = Forecast(CPU, peak, {}, {torch.device("cuda:1"): 9 * GIB})
    sizes = {CPU: 10 * GIB, torch.device("cuda:1"): 8 * GIB}
    monkeypatch.setattr("axolotl_skd.memory.device_memory", sizes.__getitem__)
    warn_of_memory(replace(what, elsewhere={}))
    assert not caplog.records
    sizes[CPU] = 10 * GIB - 1
    warn_of_memory(what)
    here, there = [record.getMessage() for record in caplog.records]
    assert "10.0 GiB are predicted to be needed on cpu, which has 10.0" in here
    assert remedies(what) == [
        "a smaller distillation.rollout.rollout_batch_size",
        "distillation.teacher: load_in_4bit: true, another device, or offload: true",
        "load_in_4bit: true with adapter: qlora",
    ]
    assert "; ".join(remedies(what)) in here
    assert "needed on cuda:1" in there and "load_in_4bit" in there


def test_every_part_of_a_forecast_has_a_remedy(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(*pair, SHAPE)
    for phase in (parts.rollout, parts.training):
        assert len(remedies(replace(parts, rollout=phase, training=phase))) == 3


def test_this_machine_has_memory() -> None:
    assert GIB < device_memory(CPU) < 2**50
    assert device_memory(torch.device("meta")) is None


def test_the_measured_peak_counts_the_models_and_what_came_after() -> None:
    gauge = PeakMemory(torch.device("cpu"), loaded=GIB)
    assert GIB <= gauge.read() < GIB + 2**20
    block: Tensor = torch.ones(2**29)  # 2 GiB, more than anything before it
    assert gauge.read() > GIB + block.nbytes // 4
