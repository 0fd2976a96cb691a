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

from axolotl_skd.config import Distillation, DistillationArgs, read_distillation
from axolotl_skd.config_blocks import (
    EvalConfig,
    GateConfig,
    LossConfig,
    RolloutConfig,
    SeqKdConfig,
    TeacherConfig,
    TopKSchedule,
    TopKTarget,
)
from axolotl_skd.losses.divergences import DIVERGENCES
from axolotl_skd.losses.gates import GATES
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
        "acceptance": "top_k",
        "teacher_top_k": 25,
        "acceptance_top_p": None,
        "acceptance_min_p": None,
        "replacement": "sample",
        "bonus_token": False,
        "student_temperature": 0.5,
        "student_top_p": 0.5,
        "teacher_temperature": 0.2,
        "teacher_top_p": 1.0,
        "num_rollouts": 1,
        "mask_truncated": False,
        "stop_token_ids": (),
        "stop_strings": (),
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
        "num_rollouts",
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


# Acceptance


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"acceptance": "top_p"}, "acceptance: top_p needs acceptance_top_p"),
        ({"acceptance": "min_p"}, "acceptance: min_p needs acceptance_min_p"),
        ({"acceptance_top_p": 0.9}, "acceptance_top_p: 0.9 has no effect with acceptance: top_k"),
        (
            {"acceptance": "speculative", "acceptance_min_p": 0.1},
            "acceptance_min_p: 0.1 has no effect with acceptance: speculative",
        ),
        (
            {"acceptance": "speculative", "teacher_top_k": 5},
            "teacher_top_k has no effect with acceptance: speculative",
        ),
        (
            {"acceptance": "speculative", "teacher_top_k": {"target_acceptance": 0.8}},
            "teacher_top_k has no effect",
        ),
        (
            {"acceptance": "speculative", "replacement": "argmax"},
            "would no longer sample as the teacher does",
        ),
        ({"bonus_token": True}, "Set num_draft_tokens to a number (the paper's is 5)"),
        ({"acceptance": "topk"}, "rollout.acceptance"),
        ({"acceptance": "top_p", "acceptance_top_p": 0}, "rollout.acceptance_top_p"),
        ({"acceptance": "min_p", "acceptance_min_p": 1.1}, "rollout.acceptance_min_p"),
        ({"replacement": "greedy"}, "rollout.replacement"),
        ({"stop_strings": [""]}, "'' cannot be looked for in decoded text"),
        ({"stop_strings": ["\ufffd"]}, "cannot be looked for in decoded text"),
        ({"stop_strings": "END"}, "rollout.stop_strings"),
    ],
)
def test_acceptance_says_what_is_missing_or_in_vain(rollout: dict[str, Any], words: str) -> None:
    assert words in refusal(rollout=rollout)


@pytest.mark.parametrize(
    "rollout",
    [
        {"acceptance": "top_p", "acceptance_top_p": 1},
        {"acceptance": "min_p", "acceptance_min_p": 0.05, "replacement": "argmax"},
        {"acceptance": "speculative", "bonus_token": True, "num_draft_tokens": 5},
        {"stop_strings": ["\n\n", "END"]},
        {"teacher_top_k": {"start": 50, "end": 5}},
        {"teacher_top_k": {"start": 50, "end": 5, "schedule": "cosine"}},
        {"teacher_top_k": {"target_acceptance": 0.8}},
        {"teacher_top_k": {"target_acceptance": 0, "start": 7}},
    ],
)
def test_acceptance_survives_axolotls_dictionaries(rollout: dict[str, Any]) -> None:
    args = DistillationArgs.model_validate({"distillation": {**MINIMAL, "rollout": rollout}})
    cfg = DictDefault(args.model_dump(exclude_none=True))
    assert read_distillation(cfg) == args.distillation
    for key, value in rollout.items():
        got = getattr(args.distillation.rollout, key)
        got = got.model_dump() if isinstance(got, BaseModel) else got
        assert (
            got == value
            or (isinstance(value, dict) and value.items() <= got.items())
            or (list(got) == value)
        )


@pytest.mark.parametrize(
    ("top_k", "words"),
    [
        ({"start": 3}, "teacher_top_k.schedule.end"),
        ({"start": 0, "end": 3}, "teacher_top_k.schedule.start"),
        ({"start": 1, "end": 3, "schedule": "step"}, "teacher_top_k.schedule.schedule"),
        ({"start": 1, "ende": 3}, "unknown key 'ende'. Did you mean 'end'?"),
        ({"target_acceptance": 1.1}, "teacher_top_k.target.target_acceptance"),
        ({"target_acceptance": 0.8, "start": 0}, "teacher_top_k.target.start"),
        ({"target_acceptence": 0.8}, "Did you mean 'target_acceptance'?"),
        ({"target_acceptance": 0.8, "end": 3}, "unknown key 'end'"),
        ({}, "teacher_top_k.target.target_acceptance"),
    ],
)
def test_a_k_that_changes_is_refused_where_it_is_wrong(top_k: dict[str, Any], words: str) -> None:
    message = refusal(rollout={"teacher_top_k": top_k})
    assert words in message and message.count("Value error") + message.count("[type=") <= 2


def test_both_quantisations_at_once_are_refused() -> None:
    message = refusal(teacher={"base_model": "t", "load_in_4bit": True, "load_in_8bit": True})
    assert "load_in_4bit and load_in_8bit are set together: set one of them" in message


@pytest.mark.parametrize("method", ["skd", "on_policy_kd", "supervised_kd", "seqkd"])
@pytest.mark.parametrize("teacher", [{}, {"base_model": None}, {"base_model": ""}])
def test_methods_that_need_a_teacher_are_refused_without(method: str, teacher: Any) -> None:
    with pytest.raises(ValidationError) as error:
        Distillation.model_validate({"method": method, "teacher": teacher})
    assert f"method {method!r} needs a teacher" in str(error.value)
    assert "distillation.teacher.base_model is not set" in str(error.value)


def test_sft_needs_no_teacher() -> None:
    assert Distillation.model_validate({"method": "sft"}).teacher.base_model is None


@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_a_gate_needs_a_divergence(method: str) -> None:
    message = refusal(method=method, gate={})
    assert f"method {method!r} learns from tokens alone. Remove the gate" in message


@pytest.mark.parametrize(
    "gate", [{"reject_weight": 1.1}, {"reject_weight": -1}, {"top_k": 0}, {"rule": "top_p"}]
)
def test_a_gate_has_its_bounds(gate: dict[str, Any]) -> None:
    (key,) = gate
    assert f"gate.{key}" in refusal(gate=gate)


@pytest.mark.parametrize("method", ["skd", "on_policy_kd"])
def test_cross_entropy_needs_ground_truth(method: str) -> None:
    message = refusal(method=method, loss={"ce_weight": 0.5})
    assert f"ce_weight is 0.5, but method {method!r} never trains on the data set's" in message
    for other in ("supervised_kd", "speckd", "gkd", "mixed_skd", "two_stage"):
        assert distillation(method=other, loss={"ce_weight": 0.5}).loss.ce_weight == 0.5


@pytest.mark.parametrize("loss", [{"ce_weight": 0.5}, {"kd_weight": 0.5}])
@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_there_is_nothing_to_mix_into_a_cross_entropy(method: str, loss: dict[str, float]) -> None:
    assert f"method {method!r} has cross-entropy alone" in refusal(method=method, loss=loss)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("divergence", "forward_kl"),
        ("jsd_beta", 0.3),
        ("skew_alpha", 0.2),
        ("loss_temperature", 2.0),
    ],
)
@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_a_cross_entropy_has_no_divergence_to_shape(method: str, key: str, value: Any) -> None:
    message = refusal(method=method, loss={key: value})
    assert f"loss.{key} is {value}, but method {method!r} has no divergence" in message
    assert f"Remove {key}, or use" in message


@pytest.mark.parametrize(
    ("method", "loss", "words"),
    [
        ("skd", {"jsd_beta": 0.3}, "the divergence is forward_kl (method 'skd')"),
        ("gkd", {"jsd_beta": 0.3, "divergence": "reverse_kl"}, "set loss.divergence: jsd."),
        ("gkd", {"skew_alpha": 0.2}, "set loss.divergence: skew_kl or skew_reverse_kl."),
    ],
)
def test_a_key_of_another_divergence_is_refused(
    method: str, loss: dict[str, Any], words: str
) -> None:
    assert words in refusal(method=method, loss=loss)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("gkd", {"jsd_beta": 0.3}),
        ("skd", {"jsd_beta": 0.3, "divergence": "jsd"}),
        ("skd", {"skew_alpha": 0.2, "divergence": "skew_reverse_kl"}),
        ("skd", {"loss_temperature": 2.0}),
        ("sft", {"jsd_beta": 0.5, "skew_alpha": 0.1, "loss_temperature": 1.0}),
    ],
)
def test_a_key_of_the_loss_in_use_or_at_its_default_may_stay(
    method: str, loss: dict[str, Any]
) -> None:
    assert distillation(method=method, loss=loss).loss == LossConfig(**loss)


def test_a_fair_coin_has_no_other_share() -> None:
    message = refusal(method="imitkd", lmbda=0.3)
    assert "lmbda is 0.3, but method 'imitkd' tosses a fair coin" in message
    # What belongs to other methods altogether stays out of the way of a change of `method:`.
    for method in METHODS.keys() - {"imitkd"}:
        assert distillation(method=method, lmbda=0.3, switch_at=0.2).lmbda == 0.3


@pytest.mark.parametrize("loss", [{"ce_weight": -0.5}, {"kd_weight": 0}])
def test_weights_have_bounds(loss: dict[str, float]) -> None:
    (key,) = loss
    assert f"loss.{key}" in refusal(method="supervised_kd", loss=loss)


@pytest.mark.parametrize("keys", [{"num_rollouts": 2}, {"mask_truncated": True}])
def test_methods_that_sample_nothing_refuse_keys_about_samples(keys: dict[str, Any]) -> None:
    assert "method 'supervised_kd' samples none" in refusal(method="supervised_kd", rollout=keys)
    distillation(method="seqkd", rollout=keys)


def test_greedy_sequences_are_the_teachers_and_one_per_prompt() -> None:
    greedy = {"decoding": "greedy"}
    assert distillation(method="seqkd", seqkd=greedy).seqkd.decoding == "greedy"
    assert "method 'skd' does not train on the teacher's" in refusal(seqkd=greedy)
    message = refusal(method="seqkd", seqkd=greedy, rollout={"num_rollouts": 2})
    assert "num_rollouts is 2, but greedy completions" in message


def test_speckd_always_has_a_gate_and_others_where_they_are_given_one() -> None:
    gate = GateConfig(rule="speculative", top_k=5, reject_weight=0.01)
    assert distillation(method="speckd").active_gate == GateConfig()
    for method in ("speckd", "skd"):
        assert distillation(method=method, gate=gate.model_dump()).active_gate == gate
    assert distillation(method="supervised_kd").active_gate is None


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
        {"teacher": {"base_model": "t", "sharded": True}},
        {"rollout": {"accept": "top_p"}},
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
    yield from (
        DistillationArgs,
        Distillation,
        TeacherConfig,
        RolloutConfig,
        LossConfig,
        GateConfig,
        SeqKdConfig,
        EvalConfig,
        TopKSchedule,
        TopKTarget,
    )


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
    "not implemented": ({"teacher": {"sharded": True}}, "unknown key 'sharded'"),
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
    assert set(get_args(GateConfig.model_fields["rule"].annotation)) == set(GATES)
    assert {row.divergence for row in METHODS.values()} <= set(DIVERGENCES)
