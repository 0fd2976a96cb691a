"""What several ranks can and cannot do is known before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from axolotl_skd import rank_checks
from axolotl_skd.config import Distillation
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.rank_checks import (
    check_engine_can_start,
    check_engine_is_there,
    check_ranks,
    engine_of,
    warn_of_untested,
)
from axolotl_skd.resources import resource_path
from axolotl_skd.sharding import Engine

TEACHER = str(resource_path("example_configs") / "tiny" / "teacher")
SAVED = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
FSDP_2 = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}


def distillation(teacher: dict[str, Any] | None = None, **keys: Any) -> Distillation:
    rollout = {"max_prompt_tokens": 8, "max_new_tokens": 8, **keys.pop("rollout", {})}
    if not (teacher or {}).get("student_base"):
        teacher = {"base_model": TEACHER, **(teacher or {})}
    block = {"method": "skd", "teacher": teacher, "rollout": rollout, **keys}
    return Distillation.model_validate(block)


@pytest.mark.parametrize(
    ("cfg", "engine"),
    [
        ({}, Engine.WHOLE),
        ({"deepspeed": None, "fsdp": [], "fsdp_config": None}, Engine.WHOLE),
        ({"deepspeed": {}}, Engine.WHOLE),
        ({"deepspeed": {"bf16": {"enabled": True}}}, Engine.ZERO_1_2),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, Engine.ZERO_1_2),
        (ZERO_3, Engine.ZERO_3),
        (FSDP_2, Engine.FSDP_2),
        ({"fsdp_config": {"fsdp_version": 2}}, Engine.FSDP_2),
    ],
)
def test_the_engine_asked_for(cfg: dict[str, Any], engine: Engine) -> None:
    assert check_ranks(cfg, distillation()) is engine


def test_an_engine_that_cannot_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_checks, "find_spec", lambda _name: None)
    with pytest.raises(ConfigConflictError, match="the package is not installed. pip install deep"):
        check_engine_is_there(ZERO_3)
    check_engine_is_there(FSDP_2)
    monkeypatch.setattr(rank_checks, "find_spec", lambda _name: "there")
    check_engine_is_there(ZERO_3)
    for cpu in (False, True):
        monkeypatch.setattr(rank_checks, "on_cpu", lambda cpu=cpu: cpu)
        check_engine_can_start(Engine.ZERO_3)
        if cpu:
            with pytest.raises(
                ConfigConflictError, match="fsdp_config: is set, but there is no GPU"
            ):
                check_engine_can_start(Engine.FSDP_2)
        else:
            check_engine_can_start(Engine.FSDP_2)


def test_deepspeed_by_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(ZERO_3["deepspeed"]))
    assert engine_of({"deepspeed": str(path)}) is Engine.ZERO_3
    with pytest.raises(ConfigConflictError, match="could not be read as JSON.*FileNotFound"):
        engine_of({"deepspeed": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("cfg", "block", "said"),
    [
        ({"fsdp_config": {}, "fsdp": ["full_shard"]}, {}, "FSDP1 flattens.*fsdp_version: 2"),
        ({"deepspeed": {"zero_optimization": {"stage": "3"}}}, {}, "stage is '3'"),
        ({**ZERO_3, "load_in_4bit": True}, {}, "load_in_4bit: True.*student.*Remove deepspeed:"),
        ({**FSDP_2, "load_in_8bit": True}, {}, "load_in_8bit: True.*Remove deepspeed:"),
        (ZERO_3, {"teacher": {"adapter": "a"}}, "adapter.*merged checkpoint.*load_in_4bit: true"),
        (FSDP_2, {"teacher": {"offload": True}}, "teacher.offload: FSDP2 spreads"),
        (FSDP_2, {"teacher": {"device": "cuda:1"}}, "teacher.device: FSDP2 spreads"),
        (ZERO_3, {"teacher": {"device_map": "auto"}}, "teacher.device_map: DeepSpeed ZeRO-3"),
        (FSDP_2, {"teacher": {"student_base": True}}, "teacher.student_base: FSDP2"),
        ({**ZERO_3, "bf16": True}, {"teacher": {"dtype": "float32"}}, "dtype: float32.*bfloat16"),
        ({}, {"teacher": {"gather": "layers"}}, "plain data parallelism the teacher is whole"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            {"teacher": {"gather": "layers"}},
            "gather: layers, but with DeepSpeed ZeRO-1/2 .* Remove gather:",
        ),
        (
            ZERO_3,
            {"teacher": {"gather": "layers", "load_in_4bit": True}},
            "gather: layers, but a quantised",
        ),
        (FSDP_2, {"method": "sft", "teacher": {"gather": "layers"}}, "method sft has no teacher"),
        (ZERO_3, {"rollout": {"cuda_graphs": True}}, "Set cuda_graphs: false"),
        (FSDP_2, {"on_non_finite": "skip"}, "on_non_finite: skip .* FSDP2"),
        (ZERO_3, {"fp32_master_weights": True}, "float32 masters of its own. Remove it"),
        (
            {"deepspeed": {**ZERO_3["deepspeed"], "optimizer": {}}},
            {},
            "optimizer section.*Remove it",
        ),
        (ZERO_3, {"eval": {"tasks": ["skd_gsm8k"]}}, "16bit_weights_on_model_save: true"),
        (FSDP_2, {"eval": {"tasks": ["skd_gsm8k"]}}, "final_state_dict_type: FULL_STATE_DICT"),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True}}, {}, "offload_params: false"),
        (
            {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}},
            {},
            "cpu_ram_efficient_loading: false",
        ),
    ],
)
def test_refused(cfg: dict[str, Any], block: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigConflictError, match=said):
        check_ranks(cfg, distillation(**block))


@pytest.mark.parametrize("cfg", [ZERO_3, FSDP_2])
@pytest.mark.parametrize("teacher", [{}, {"adapter": "some/adapter", "device": "cuda:1"}])
def test_a_quantised_teacher_stays_whole_and_may_be_anything(
    cfg: dict[str, Any], teacher: dict[str, Any]
) -> None:
    check_ranks(cfg, distillation(teacher={"load_in_4bit": True, "dtype": "bfloat16", **teacher}))


def test_so_does_one_that_comes_quantised(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    AutoConfig.for_model("llama", quantization_config=settings).save_pretrained(tmp_path)
    comes_so = {"base_model": str(tmp_path), "adapter": "some/adapter", "dtype": "float16"}
    check_ranks(ZERO_3, distillation(teacher=comes_so))
    with pytest.raises(ConfigConflictError, match="gather: layers, but a quantised"):
        check_ranks(ZERO_3, distillation(teacher={**comes_so, "gather": "layers"}))


def test_what_can_be_saved_is_evaluated() -> None:
    asked = distillation(eval={"tasks": ["skd_gsm8k"]})
    check_ranks({"deepspeed": {"zero_optimization": {"stage": 3, **SAVED}}}, asked)
    check_ranks({"fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, asked)
    check_ranks(ZERO_3, distillation(eval={"tasks": ["skd_gsm8k"], "at": ["start"]}))


def test_a_device_map_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = distillation(teacher={"device_map": "auto"})
    check_ranks({}, asked)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigConflictError, match="Launch one process, or use device:"):
        check_ranks({}, asked)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({}, []),
        (ZERO_3, ["DeepSpeed ZeRO-3 is untested: it has been run on CPU ranks only"]),
        ({**FSDP_2, "use_ray": True}, ["FSDP2 is untested", "use_ray: true is untested"]),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, ["DeepSpeed ZeRO-1/2 is untested"]),
    ],
)
def test_untested_is_said(
    cfg: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_untested(cfg, engine_of(cfg))
    assert len(caplog.messages) == len(said)
    for message, words in zip(caplog.messages, said, strict=True):
        assert words in message


def test_ddp_is_untested_on_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for ranks, cpu in (("1", False), ("2", True), ("2", False)):
        assert not caplog.messages
        monkeypatch.setenv("WORLD_SIZE", ranks)
        monkeypatch.setattr(rank_checks, "on_cpu", lambda cpu=cpu: cpu)
        warn_of_untested({}, Engine.WHOLE)
    assert "DDP is untested: it has been run on CPU ranks only" in caplog.messages[0]
