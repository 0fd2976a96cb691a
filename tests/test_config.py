"""The `distillation:` block: bounds, unknown keys, defaults, and the way through Axolotl's loading.

Axolotl's plugin manager and merged schema are singletons of a process, so its own `load_cfg` is tried
in one subprocess for all of the configs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from pydantic import BaseModel, ValidationError

from axolotl_skd.config import (
    Distillation,
    DistillationArgs,
    EvalConfig,
    LossConfig,
    RolloutConfig,
    TeacherConfig,
    read_distillation,
)
from axolotl_skd.losses.divergences import DIVERGENCES
from axolotl_skd.methods import METHODS
from tests.helpers import save_pair

MINIMAL: dict[str, Any] = {"teacher": {"base_model": "some/teacher"}}


def distillation(**keys: Any) -> Distillation:
    return Distillation.model_validate({**MINIMAL, **keys})


def refusal(**keys: Any) -> str:
    with pytest.raises(ValidationError) as error:
        distillation(**keys)
    return str(error.value)


# Defaults


def test_defaults_are_the_papers() -> None:
    block = distillation()
    assert block.method == "skd"
    assert block.eval is None and block.seed is None
    assert block.rollout.model_dump() == {
        "max_prompt_tokens": 256,
        "max_new_tokens": 512,
        "num_draft_tokens": "auto",  # which changes no token of the paper's 5
        "rollout_batch_size": None,
        "cuda_graphs": False,
        "teacher_top_k": 25,
        "student_temperature": 0.5,
        "student_top_p": 0.5,
        "teacher_temperature": 0.2,
        "teacher_top_p": 1.0,
        "stop_token_ids": (),
    }
    assert not block.teacher.load_in_4bit and not block.teacher.load_in_8bit
    assert block.teacher.dtype == "auto"
    assert not block.teacher.trust_remote_code


def test_blocks_are_read_only() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        distillation().rollout.teacher_top_k = 3


# Bounds


@pytest.mark.parametrize("key", ["student_top_p", "teacher_top_p"])
@pytest.mark.parametrize("value", [0, -0.1, 1.0001, float("nan")])
def test_top_p_lies_in_0_to_1(key: str, value: float) -> None:
    assert f"rollout.{key}" in refusal(rollout={key: value})
    assert getattr(distillation(rollout={key: 1}).rollout, key) == 1.0


@pytest.mark.parametrize("key", ["student_temperature", "teacher_temperature"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "warm"])
def test_temperatures_are_positive(key: str, value: Any) -> None:
    assert f"rollout.{key}" in refusal(rollout={key: value})
    assert getattr(distillation(rollout={key: 0.01}).rollout, key) == 0.01


@pytest.mark.parametrize(
    "key",
    [
        "teacher_top_k",
        "num_draft_tokens",
        "rollout_batch_size",
        "max_prompt_tokens",
        "max_new_tokens",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "all"])
def test_counts_are_whole_and_at_least_1(key: str, value: Any) -> None:
    assert f"rollout.{key}" in refusal(rollout={key: value})
    assert getattr(distillation(rollout={key: 1}).rollout, key) == 1


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"teacher": {"base_model": "t", "dtype": "int8"}}, "teacher.dtype"),
        ({"teacher": {"base_model": "t", "bnb_4bit_quant_type": "nf8"}}, "bnb_4bit_quant_type"),
        (
            {"teacher": {"base_model": "t", "attn_implementation": "xformers"}},
            "teacher.attn_implementation",
        ),
        ({"rollout": {"stop_token_ids": ["<eos>"]}}, "rollout.stop_token_ids"),
        ({"seed": "random"}, "seed"),
        ({"eval": {"tasks": []}}, "eval.tasks"),
        ({"eval": {}}, "eval.tasks"),
        ({"eval": {"tasks": ["a"], "limit": 0}}, "eval.limit"),
        ({"eval": {"tasks": ["a"], "batch_size": 0}}, "eval.batch_size"),
        ({"eval": {"tasks": ["a"], "at": ["middle"]}}, "eval.at"),
        ({"eval": {"tasks": ["a"], "backend": "sglang"}}, "eval.backend"),
    ],
)
def test_other_values_out_of_bounds_are_refused_where_they_stand(keys: Any, where: str) -> None:
    assert where in refusal(**keys)


def test_both_quantisations_at_once_are_refused() -> None:
    message = refusal(teacher={"base_model": "t", "load_in_4bit": True, "load_in_8bit": True})
    assert "load_in_4bit and load_in_8bit are both true: set one of them" in message


@pytest.mark.parametrize("method", ["skd", "on_policy_kd", "supervised_kd", "seqkd"])
@pytest.mark.parametrize("teacher", [{}, {"base_model": None}, {"base_model": ""}])
def test_methods_that_need_a_teacher_are_refused_without(method: str, teacher: Any) -> None:
    with pytest.raises(ValidationError) as error:
        Distillation.model_validate({"method": method, "teacher": teacher})
    assert f"method {method!r} needs a teacher" in str(error.value)
    assert "distillation.teacher.base_model is not set" in str(error.value)


def test_sft_needs_no_teacher() -> None:
    assert Distillation.model_validate({"method": "sft"}).teacher.base_model is None


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    message = refusal(method="supervized_kd")
    assert "there is no method 'supervized_kd'. Did you mean 'supervised_kd'?" in message


# Unknown keys


@pytest.mark.parametrize(
    ("keys", "wrong", "near"),
    [
        ({"rolout": {}}, "rolout", "rollout"),
        ({"rollout": {"teacher_topk": 3}}, "teacher_topk", "teacher_top_k"),
        ({"rollout": {"max_tokens": 3}}, "max_tokens", "max_new_tokens"),
        ({"teacher": {"base_model": "t", "load_in_4bits": True}}, "load_in_4bits", "load_in_4bit"),
        ({"eval": {"tasks": ["a"], "batchsize": 3}}, "batchsize", "batch_size"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(keys: Any, wrong: str, near: str) -> None:
    message = refusal(**keys)
    assert f"unknown key {wrong!r}. Did you mean {near!r}?" in message
    assert "Known keys here: " in message


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": {"kd_weight": 1.0}},
        {"teacher": {"base_model": "t", "adapter": "x"}},
        {"rollout": {"bonus_token": True}},
        {"rollout": {"accept": "top_p"}},
        {"rollout": {"num_rollouts": 2}},
    ],
)
def test_a_key_of_the_design_that_does_nothing_yet_is_unknown(keys: Any) -> None:
    # Accepting it would train on something other than what was asked for.
    assert "unknown key" in refusal(**keys)


@pytest.mark.parametrize("block", ["teacher", "rollout", "eval"])
@pytest.mark.parametrize("value", ["yes", 3, ["a"]])
def test_a_block_must_be_a_block(block: str, value: Any) -> None:
    assert f"expected a block of keys, got {value!r}" in refusal(**{block: value})


def blocks() -> Iterator[type[BaseModel]]:
    yield from (DistillationArgs, Distillation, TeacherConfig, RolloutConfig, EvalConfig)


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.__name__)
def test_every_key_is_described(block: type[BaseModel]) -> None:
    for name, field in block.model_fields.items():
        assert field.description and field.description.endswith("."), name


# Through Axolotl's dictionaries

FULL: dict[str, Any] = {
    "method": "seqkd",
    "teacher": {
        "base_model": "some/teacher",
        "revision": "main",
        "dtype": "bfloat16",
        "load_in_4bit": True,
    },
    "rollout": {"teacher_top_k": 3, "student_top_p": 0.9, "stop_token_ids": [5, 7]},
    "eval": {"tasks": ["skd_tiny_arithmetic"], "limit": 4, "at": ["end"]},
    "seed": 0,
}


@pytest.mark.parametrize("block", [MINIMAL, FULL, {"method": "sft"}])
def test_the_block_survives_axolotls_dictionaries(block: dict[str, Any]) -> None:
    # As Axolotl does: validated, dumped without None, wrapped in a class that answers None.
    args = DistillationArgs.model_validate({"distillation": block})
    cfg = DictDefault(args.model_dump(exclude_none=True))
    assert read_distillation(cfg) == args.distillation == Distillation.model_validate(block)
    assert read_distillation(DictDefault({"distillation": block})) == args.distillation


def test_values_survive_as_they_were_set() -> None:
    block = read_distillation(DictDefault({"distillation": FULL}))
    assert block.seed == 0
    assert block.teacher.load_in_4bit and block.teacher.dtype == "bfloat16"
    assert block.rollout.stop_token_ids == (5, 7)
    assert block.rollout.student_top_p == 0.9 and block.rollout.teacher_top_p == 1.0
    assert block.eval.tasks == ("skd_tiny_arithmetic",) and block.eval.at == ("end",)


@pytest.mark.parametrize("cfg", [{}, {"distillation": None}, {"base_model": "x"}])
def test_no_block_reads_as_none(cfg: dict[str, Any]) -> None:
    assert read_distillation(DictDefault(cfg)) is None
    assert read_distillation(cfg) is None


# Through Axolotl's own loading

LOAD_ALL = """
import json, sys
from axolotl.cli.config import load_cfg
from axolotl_skd.config import read_distillation

answers = {}
for path in sys.argv[2:]:
    try:
        cfg = load_cfg(path)
        answers[path] = {"block": read_distillation(cfg).model_dump(mode="json")}
    except Exception as error:
        answers[path] = {"error": f"{type(error).__name__}: {error}"}
open(sys.argv[1], "w").write(json.dumps(answers))
"""

BAD_BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"rollout": {"teacher_topk": 3}}, "Did you mean 'teacher_top_k'?"),
    "not implemented": ({"loss": {"kd_weight": 1.0}}, "unknown key 'kd_weight'"),
    "unknown method": ({"method": "sdk"}, "Did you mean 'skd'?"),
    "bound": ({"rollout": {"student_top_p": 1.5}}, "distillation.rollout.student_top_p"),
    "no teacher": ({"teacher": {}}, "distillation.teacher.base_model is not set"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What Axolotl's `load_cfg` says to a good config and to each of the bad ones, by name."""
    folder = tmp_path_factory.mktemp("configs")
    student, teacher = save_pair(folder)
    good = {**FULL, "teacher": {**FULL["teacher"], "base_model": str(teacher)}}
    blocks = {"good": good, **{name: {**good, **bad} for name, (bad, _) in BAD_BLOCKS.items()}}
    paths = {name: folder / f"{name}.yml" for name in blocks}
    for name, block in blocks.items():
        cfg = {
            "base_model": str(student),
            "plugins": ["axolotl_skd.SKDPlugin"],
            "distillation": block,
            "datasets": [{"path": "unused.jsonl", "ds_type": "json", "type": "chat_template"}],
            "output_dir": str(folder / "out"),
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-4,
            "sequence_len": 64,
            "bf16": False,
        }
        paths[name].write_text(yaml.safe_dump(cfg))
    subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(folder / "answers.json"), *map(str, paths.values())],
        check=True,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        timeout=300,
    )
    answers = json.loads((folder / "answers.json").read_text())
    return {name: answers[str(path)] for name, path in paths.items()}


def test_axolotl_loads_a_good_block_as_it_was_written(loaded: dict[str, dict[str, Any]]) -> None:
    assert "error" not in loaded["good"], loaded["good"]
    block = Distillation.model_validate(loaded["good"]["block"])
    expected = Distillation.model_validate(FULL)
    assert block.teacher.base_model != "some/teacher"
    assert block.model_dump(exclude={"teacher": {"base_model"}}) == expected.model_dump(
        exclude={"teacher": {"base_model"}}
    )


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_axolotl_refuses_a_bad_block_in_our_words(
    name: str, loaded: dict[str, dict[str, Any]]
) -> None:
    assert BAD_BLOCKS[name][1] in loaded[name]["error"]


@pytest.mark.parametrize(
    ("beta", "hint"), [(0, "divergence: forward_kl"), (1, "divergence: reverse_kl"), (1.5, "")]
)
def test_jsd_beta_lies_inside_and_names_what_others_mean(beta: float, hint: str) -> None:
    with pytest.raises(ValidationError, match=f"jsd_beta must lie inside.*{hint}"):
        LossConfig(divergence="jsd", jsd_beta=beta)


def test_the_divergences_of_the_schema_are_those_of_the_table() -> None:
    literal, _none = get_args(LossConfig.model_fields["divergence"].annotation)
    assert set(get_args(literal)) == set(DIVERGENCES)
    assert {row.divergence for row in METHODS.values()} <= set(DIVERGENCES)
