"""What is refused before a model is loaded, in words that name the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType
from transformers import AutoConfig, LlamaConfig, MambaConfig, PreTrainedTokenizerFast

from axolotl_skd import preflight
from axolotl_skd.config import Distillation
from axolotl_skd.config_blocks import GateConfig
from axolotl_skd.preflight import (
    ConfigConflictError,
    check_block_is_there,
    check_models,
    check_settings,
    check_top_k,
    sampling_params,
    stop_set,
    usable_positions,
)
from axolotl_skd.rollout.lm import UnsupportedModelError
from axolotl_skd.teacher import TeacherError
from axolotl_skd.vocabulary import SharedVocabulary, VocabularyError
from tests.helpers import VOCAB_SIZE, save_model, save_pair, save_tokenizer, word_vocab


def distillation(
    method: str = "skd", teacher: Path | str = "some/teacher", **rollout: Any
) -> Distillation:
    return Distillation.model_validate(
        {"method": method, "teacher": {"base_model": str(teacher)}, "rollout": rollout}
    )


# Settings


def settings(**keys: Any) -> DictDefault:
    return DictDefault({"base_model": "some/student", **keys})


def refused(**keys: Any) -> str:
    with pytest.raises(ConfigConflictError) as refusal:
        check_settings(settings(**keys), distillation())
    return str(refusal.value)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sample_packing": False, "eval_sample_packing": False, "streaming": False, "rl": None},
        {"attn_implementation": "sdpa"},
        {"attn_implementation": "eager"},
        {"context_parallel_size": 1, "tensor_parallel_size": 1},
        {"adapter": "lora", "lora_target_linear": True},
        {"adapter": "qlora", "lora_target_modules": ["q_proj", "v_proj"]},
        {"adapter": "lora", "lora_modules_to_save": []},
    ],
)
def test_settings_that_distillation_honours(
    keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check_settings(settings(**keys), distillation())
    assert not caplog.records


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rl": "dpo"}, ["rl: dpo selects another trainer", "Remove rl:"]),
        (
            {"sample_packing": True},
            ["packs several rows into one sequence", "Set sample_packing: false"],
        ),
        ({"eval_sample_packing": True}, ["eval_sample_packing: false"]),
        ({"streaming": True}, ["streaming / pretraining_dataset", "Use datasets:"]),
        ({"pretraining_dataset": [{"path": "x"}]}, ["streaming / pretraining_dataset"]),
        (
            {"context_parallel_size": 2},
            ["context_parallel_size: 2", "Set context_parallel_size: 1"],
        ),
        ({"tensor_parallel_size": 4}, ["tensor_parallel_size: 4", "Set tensor_parallel_size: 1"]),
        (
            {"attn_implementation": "xformers"},
            ["attn_implementation: xformers takes no 4-D mask", "Set attn_implementation: sdpa"],
        ),
    ],
)
def test_settings_that_distillation_cannot_honour(keys: dict[str, Any], said: list[str]) -> None:
    message = refused(**keys)
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("cpu", "keys", "masters", "said"),
    [
        (True, {"fp16": True}, True, "on a CPU there is no fp16 mixed precision"),
        (False, {"fp16": True}, False, "unscale FP16 gradients"),
        (False, {"fp16": True}, True, None),
        (False, {"fp16": True, "adapter": "lora"}, False, None),
        (False, {"bf16": True}, False, None),
        (True, {"bf16": True}, True, None),
        (True, {}, True, "in float32 already. Remove it"),
        (True, {"bfloat16": True}, True, "Set bf16: true in its place"),
        (False, {"float16": True}, True, "Set fp16: true in its place"),
        (True, {"torch_compile": True}, False, None),
    ],
)
def test_precision(
    monkeypatch: pytest.MonkeyPatch,
    cpu: bool,
    keys: dict[str, Any],
    masters: bool,
    said: str | None,
) -> None:
    monkeypatch.setattr(preflight, "on_cpu", lambda: cpu)
    block = distillation().model_copy(update={"fp32_master_weights": masters})
    if said is None:
        check_settings(settings(**keys), block)
        return
    with pytest.raises(ConfigConflictError, match=said):
        check_settings(settings(**keys), block)


def test_the_gradient_scaler_refuses_what_is_said_of_it() -> None:
    """Torch's own words, in `_check_precision`'s message."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu")
    scaler.scale(weight.float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_a_state_is_refused_by_its_configuration(tmp_path: Path, role: str) -> None:
    paths = dict(zip(("student", "teacher"), save_pair(tmp_path), strict=True))
    MambaConfig(vocab_size=VOCAB_SIZE).save_pretrained(paths[role])
    (paths[role] / "model.safetensors").unlink()
    key = {"student": "^base_model", "teacher": "^distillation.teacher.base_model"}[role]
    with pytest.raises(UnsupportedModelError, match=f"{key}: .*linear_attention"):
        check_models(
            settings(base_model=str(paths["student"])),
            distillation(teacher=paths["teacher"], max_prompt_tokens=8, max_new_tokens=8),
            save_tokenizer(tmp_path / "tokenizer"),
        )


def test_the_enum_of_a_validated_config_is_named_as_in_the_yaml() -> None:
    assert "rl: dpo selects another trainer" in refused(rl=RLType.DPO)


@pytest.mark.parametrize("key", ["lora_target_modules", "lora_modules_to_save"])
@pytest.mark.parametrize("value", [["q_proj", "lm_head"], "lm_head", ["model.lm_head"]])
def test_an_adapter_on_the_output_head(key: str, value: Any) -> None:
    message = refused(adapter="lora", **{key: value})
    head = "model.lm_head" if value == ["model.lm_head"] else "lm_head"
    assert f"{key}: ['{head}'] adapts or copies the output head" in message
    assert f"Remove ['{head}'] from {key}" in message


@pytest.mark.parametrize("adapter", ["llama-adapter", "ia3"])
def test_other_adapters(adapter: str) -> None:
    message = refused(adapter=adapter)
    assert f"adapter: {adapter}" in message and "Use adapter: lora or qlora" in message


def warning_of_same_model(caplog: pytest.LogCaptureFixture, student: str, teacher: str) -> bool:
    caplog.clear()
    check_settings(settings(base_model=student), distillation(teacher=teacher))
    return any(
        record.levelname == "WARNING" and "self-distillation" in record.getMessage()
        for record in caplog.records
    )


def test_self_distillation_is_allowed_with_a_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert warning_of_same_model(caplog, "org/model", "org/model")
    assert warning_of_same_model(caplog, "one", "./one")
    assert warning_of_same_model(caplog, "one", str(tmp_path / "one"))
    assert warning_of_same_model(caplog, "one", "link")
    assert not warning_of_same_model(caplog, "one", "two")
    assert not warning_of_same_model(caplog, "org/model", "org/other")
    assert not warning_of_same_model(caplog, "one", "org/model")


@pytest.mark.parametrize(
    ("keys", "method", "loss", "warned"),
    [
        ({}, "skd", {}, True),
        ({"lora_model_dir": "trained"}, "skd", {}, False),
        ({}, "supervised_kd", {"kd_weight": 0.5, "ce_weight": 0.5}, False),
        ({}, "seqkd", {}, False),
    ],
)
def test_a_fresh_adapter_learns_nothing_from_its_base(
    caplog: pytest.LogCaptureFixture,
    keys: dict[str, Any],
    method: str,
    loss: dict[str, Any],
    warned: bool,
) -> None:
    block = {"method": method, "teacher": {"student_base": True}, "loss": loss}
    check_settings(settings(adapter="lora", **keys), Distillation.model_validate(block))
    assert ("nothing to learn but noise" in " ".join(caplog.text.split())) == warned


def test_the_best_of_no_evaluations_is_none() -> None:
    message = refused(load_best_model_at_end=True, save_steps=5)
    assert "nothing is evaluated on the way: eval_steps is not set" in message


def test_a_teacher_that_is_not_used_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    check_settings(settings(), distillation("sft", teacher="some/student"))
    assert [record.getMessage() for record in caplog.records] == [
        "distillation.teacher is not used: method sft learns from the data set alone."
    ]


# The block itself, in the config as written


def test_a_block_with_keys_is_fine(caplog: pytest.LogCaptureFixture) -> None:
    check_block_is_there({"base_model": "a", "distillation": {"method": "skd"}})
    assert not caplog.records


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(ConfigConflictError, match="distillation: is there, but has no keys"):
        check_block_is_there({"base_model": "a", "distillation": None})


@pytest.mark.parametrize("key", ["distilation", "distillations", "Distillation"])
def test_a_misspelt_block_is_refused(key: str) -> None:
    with pytest.raises(ConfigConflictError, match=f"{key}: is no key.*mean distillation:"):
        check_block_is_there({"base_model": "a", key: {"method": "skd"}})


def test_a_plugin_without_a_block_warns(caplog: pytest.LogCaptureFixture) -> None:
    check_block_is_there({"base_model": "a", "datasets": [], "adapter": "lora"})
    assert "plain fine-tuning" in caplog.text


# Rotary embeddings that change with the length


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_is_used_up_to_its_original_length(kind: str) -> None:
    """Behind it, cached keys would belong to another rotation than new ones."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "original_max_position_embeddings": 64,
            "short_factor": [1.0],
            "long_factor": [2.0],
        }
        config = LlamaConfig(hidden_size=8, num_attention_heads=4, max_position_embeddings=256)
        config.rope_parameters = rope
    else:
        config = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    assert usable_positions(config) == (
        64,
        f" before its {kind} rotary embedding changes with the length",
    )


def test_plain_rope_is_used_in_full() -> None:
    assert usable_positions(LlamaConfig(max_position_embeddings=64)) == (64, "")


# Models


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"), vocab_size=VOCAB_SIZE + 8)


@pytest.fixture
def tokenizer(pair: tuple[Path, Path]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(pair[0])


SHORT: dict[str, Any] = {"max_prompt_tokens": 40, "max_new_tokens": 24, "teacher_top_k": 4}


def model_refusal(
    error: type[Exception], student: Path, tokenizer: Any, settings: Distillation, **keys: Any
) -> str:
    with pytest.raises(error) as refusal:
        check_models(DictDefault({"base_model": str(student), **keys}), settings, tokenizer)
    return str(refusal.value)


def test_a_good_pair(pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    student, teacher = pair
    cfg = DictDefault({"base_model": str(student)})
    found = check_models(cfg, distillation(teacher=teacher, **SHORT), tokenizer)
    assert found.stop_token_ids == (0,)
    assert found.student_vocab == found.teacher_vocab == word_vocab()


def test_sft_reads_no_teacher(pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = DictDefault({"base_model": str(pair[0])})
    found = check_models(cfg, distillation("sft", teacher="no/such-teacher"), tokenizer)
    assert found.teacher_vocab is None


def test_completions_beyond_the_students_positions(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    # The pair has 64 positions each.
    longer = distillation(teacher=pair[1], **{**SHORT, "max_new_tokens": 25})
    message = model_refusal(ConfigConflictError, pair[0], tokenizer, longer)
    assert "max_prompt_tokens (40) + max_new_tokens (25) = 65" in message
    assert "but base_model has 64 positions" in message


def test_completions_beyond_the_teachers_positions(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path)
    save_model(tmp_path, max_position_embeddings=63)
    message = model_refusal(
        ConfigConflictError, pair[0], tokenizer, distillation(teacher=tmp_path, **SHORT)
    )
    assert "but distillation.teacher.base_model has 63 positions" in message


@pytest.mark.parametrize("role", ["base_model", "distillation.teacher.base_model"])
@pytest.mark.parametrize("implementation", [None, "sdpa", "eager", "flash_attention_2"])
def test_softcapped_scores_are_not_left_out(
    pair: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    role: str,
    implementation: str | None,
) -> None:
    """Transformers' SDPA, its default, ignores Gemma-2's softcap without a word."""
    AutoConfig.for_model("gemma2", vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    key = "attn_implementation"
    if role == "base_model":
        folders, keys, teacher_keys = (tmp_path, pair[1]), {key: implementation}, {}
    else:
        folders, keys, teacher_keys = (pair[0], tmp_path), {}, {key: implementation}
        key = f"distillation.teacher.{key}"
    block = distillation(teacher=folders[1], **SHORT)
    teacher = block.teacher.model_copy(update=teacher_keys)
    block = block.model_copy(update={"teacher": teacher})
    cfg = DictDefault({"base_model": str(folders[0]), **keys})
    # A teacher whose attention nobody asked for is loaded with eager.
    if implementation == "sdpa" or (implementation is None and role == "base_model"):
        with pytest.raises(ConfigConflictError, match=f"{role} .gemma2. are softcapped.*{key}: e"):
            check_models(cfg, block, tokenizer)
    else:
        check_models(cfg, block, tokenizer)


def test_a_teacher_on_a_device_that_is_not_there(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    block = distillation(teacher=pair[1], **SHORT)
    block = block.model_copy(update={"teacher": block.teacher.model_copy(update={"device": "gpu"})})
    message = model_refusal(ConfigConflictError, pair[0], tokenizer, block)
    assert "teacher.device: gpu is none of this machine's devices" in message and "cpu" in message


def test_methods_that_do_not_sample_need_no_room_for_it(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = DictDefault({"base_model": str(pair[0])})
    check_models(cfg, distillation("sft", max_new_tokens=10_000), tokenizer)


def test_k_beyond_the_shared_vocabulary(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    # 32 rows here, 40 there: 32 are shared.
    def with_k(top_k: int) -> Distillation:
        return distillation(teacher=pair[1], **{**SHORT, "teacher_top_k": top_k})

    check_models(DictDefault({"base_model": str(pair[0])}), with_k(32), tokenizer)
    message = model_refusal(ConfigConflictError, pair[0], tokenizer, with_k(33))
    assert "teacher_top_k is 33, but the shared vocabulary has 32 tokens" in message
    assert "Set 1 to 32" in message and "on_policy_kd" in message


def test_k_is_compared_with_what_both_share() -> None:
    shared = SharedVocabulary(size=10, student_size=12, teacher_size=10, student_only=())
    check_top_k(distillation(teacher_top_k=10), shared)
    with pytest.raises(ConfigConflictError, match="shared vocabulary has 10 tokens"):
        check_top_k(distillation(teacher_top_k=11), shared)


@pytest.mark.parametrize(
    "top_k",
    [{"start": 1, "end": 11}, {"start": 11, "end": 1}, {"target_acceptance": 1, "start": 11}],
)
def test_no_k_of_the_run_may_lie_beyond(top_k: dict[str, Any]) -> None:
    shared = SharedVocabulary(size=10, student_size=12, teacher_size=10, student_only=())
    with pytest.raises(ConfigConflictError, match="11.*shared vocabulary has 10 tokens"):
        check_top_k(distillation(teacher_top_k=top_k), shared)
    # Rules without a K do not care about its default of 25.
    check_top_k(distillation(acceptance="speculative"), shared)


def test_a_gate_that_could_reject_nothing_is_refused() -> None:
    shared = SharedVocabulary(size=10, student_size=10, teacher_size=10, student_only=())
    gated = distillation("speckd").model_copy(update={"gate": GateConfig(top_k=11)})
    with pytest.raises(ConfigConflictError, match="gate.top_k is 11.*has 10 tokens"):
        check_top_k(gated, shared)
    draws = GateConfig(rule="speculative", top_k=11)
    check_top_k(gated.model_copy(update={"gate": draws}), shared)


@pytest.mark.parametrize("name", ["no/such-teacher", "{tmp_path}"])
def test_a_teacher_that_cannot_be_read(
    name: str, pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    name = name.format(tmp_path=tmp_path)
    message = model_refusal(TeacherError, pair[0], tokenizer, distillation(teacher=name, **SHORT))
    assert f"distillation.teacher.base_model: the configuration of {name!r}" in message


def test_a_teacher_without_a_tokenizer(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tmp_path)
    message = model_refusal(
        TeacherError, pair[0], tokenizer, distillation(teacher=tmp_path, **SHORT)
    )
    assert "distillation.teacher.base_model: the tokenizer of" in message


def test_a_teacher_of_another_tokenizer(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tmp_path)
    save_tokenizer(tmp_path, {**word_vocab(), "w7": 9, "w9": 7})
    message = model_refusal(
        VocabularyError, pair[0], tokenizer, distillation(teacher=tmp_path, **SHORT)
    )
    assert "2 of 32 shared ids differ, first id 7: 'w7' against 'w9'" in message


def test_a_token_added_to_the_student_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    # As Axolotl's `tokens:` does. Here the teacher's head has no row left for it.
    save_model(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pair[0])
    tokenizer.add_tokens(["<new>"])
    message = model_refusal(
        VocabularyError, pair[0], tokenizer, distillation(teacher=tmp_path, **SHORT)
    )
    assert "'<new>' (id 32)" in message
    # The pair's teacher has spare rows.
    cfg = DictDefault({"base_model": str(pair[0])})
    check_models(cfg, distillation(teacher=pair[1], **SHORT), tokenizer)


# The stop set


def stops(tokenizer: Any, eot_tokens: Any = None, **rollout: Any) -> tuple[int, ...]:
    cfg = DictDefault({"eot_tokens": eot_tokens})
    return stop_set(cfg, distillation(**rollout), tokenizer)


def test_the_stop_set_is_eos_turn_ends_and_the_blocks_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert stops(tokenizer) == (0,)
    assert stops(tokenizer, eot_tokens=["w9", "w4"]) == (0, 4, 9)
    assert stops(tokenizer, eot_tokens=["w9"], stop_token_ids=[31, 5, 9]) == (0, 5, 9, 31)


@pytest.mark.parametrize("beyond", [VOCAB_SIZE, -1])
def test_stop_ids_lie_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast, beyond: int) -> None:
    with pytest.raises(ConfigConflictError) as refusal:
        stops(tokenizer, stop_token_ids=[3, beyond])
    assert f"distillation.rollout.stop_token_ids: [{beyond}] are no ids of" in str(refusal.value)
    assert f"{VOCAB_SIZE} tokens" in str(refusal.value)


@pytest.mark.parametrize("token", ["<end_of_turn>", "w3 w4"])
def test_a_turn_end_that_is_no_token(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    with pytest.raises(ConfigConflictError) as refusal:
        stops(tokenizer, eot_tokens=[token])
    assert f"eot_tokens: {token!r} is no token of the student's tokenizer" in str(refusal.value)


def test_something_must_stop_a_rollout(tmp_path: Path) -> None:
    endless = save_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ConfigConflictError, match="the stop set is empty"):
        stops(endless)
    assert stops(endless, stop_token_ids=[4]) == (4,)


def test_the_engine_gets_the_blocks_sampling() -> None:
    block = distillation(
        num_draft_tokens=2,
        teacher_top_k=3,
        student_temperature=0.4,
        student_top_p=0.5,
        teacher_temperature=0.6,
        teacher_top_p=0.7,
        replacement="argmax",
        bonus_token=True,
    )
    params = sampling_params(block, (0, 9))
    for name in (
        "num_draft_tokens",
        "teacher_top_k",
        "student_temperature",
        "student_top_p",
        "teacher_temperature",
        "teacher_top_p",
        "replacement",
        "bonus_token",
    ):
        assert getattr(params, name) == getattr(block.rollout, name)
    assert params.stop_token_ids == (0, 9)


def test_the_engine_gets_what_belongs_to_the_rule() -> None:
    by_mass = distillation(acceptance="top_p", acceptance_top_p=0.3)
    assert sampling_params(by_mass, ()).acceptance_top_p == 0.3
    by_share = distillation(acceptance="min_p", acceptance_min_p=0.2)
    assert sampling_params(by_share, ()).acceptance_min_p == 0.2


@pytest.mark.parametrize(
    "top_k", [{"start": 6, "end": 2}, {"target_acceptance": 0.5, "start": 6}], ids=str
)
def test_a_k_that_changes_is_first_its_start(top_k: dict[str, Any]) -> None:
    assert sampling_params(distillation(teacher_top_k=top_k), ()).teacher_top_k == 6
