"""Everything that can be known to be wrong before a model is loaded.

Each refusal says what was got, what is needed, what to do, and names the YAML key.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from axolotl_skd.config import Distillation
from axolotl_skd.cpu import on_cpu
from axolotl_skd.devices import present_devices
from axolotl_skd.methods import LossRecipe
from axolotl_skd.prompts import DATASET_TYPE
from axolotl_skd.rollout.attention import default_attention, is_softcapped, rollout_attention
from axolotl_skd.rollout.lm import require_cache_by_position
from axolotl_skd.rollout.types import SamplingParams, Source
from axolotl_skd.teacher import (
    check_quantised_checkpoint,
    read_teacher_config,
    read_teacher_tokenizer,
)
from axolotl_skd.unread_keys import unread_keys
from axolotl_skd.vocabulary import SharedVocabulary, share_vocabulary

LOG = get_logger(__name__)

# Models all in 16 bits, and mixed precision.
_MIXED = {"bfloat16": "bf16", "float16": "fp16"}


class ConfigConflictError(ValueError):
    """Settings that contradict each other or that distillation cannot honour."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found out, for those who load and train.

    Attributes:
        stop_token_ids: the stop set, ascending.
        student_vocab, teacher_vocab: token -> id; the teacher's is None for methods without one.
    """

    stop_token_ids: tuple[int, ...]
    student_vocab: Mapping[str, int]
    teacher_vocab: Mapping[str, int] | None


def check_block_is_there(raw: Mapping[str, Any]) -> None:
    """Refuse a block that is empty or misspelt, warn if there is none.

    Axolotl drops unknown top-level keys and keys without a value without a word, and would go on as
    plain fine-tuning.

    Args:
        raw: the config as written.

    Raises:
        ConfigConflictError
    """
    block = raw.get("distillation")
    if block is not None:
        # Where nothing means that there is none, an empty block would pass for that.
        for key in ("gate", "eval"):
            if isinstance(block, Mapping) and key in block and block[key] is None:
                raise ConfigConflictError(
                    f"distillation.{key}: is there, but has no keys. Give it some, or remove it."
                )
        return
    if "distillation" in raw:
        raise ConfigConflictError(
            "distillation: is there, but has no keys. Give it a method and a teacher, or remove it."
        )
    near = difflib.get_close_matches("distillation", [str(key) for key in raw], n=1, cutoff=0.7)
    if near:
        raise ConfigConflictError(
            f"{near[0]}: is no key of Axolotl or axolotl_skd. Did you mean distillation:?"
        )
    LOG.warning(
        "plugins: names axolotl_skd.SKDPlugin, but the config has no distillation: block, so this is "
        "plain fine-tuning."
    )


def check_settings(cfg: Mapping[str, Any], distillation: Distillation) -> None:
    """Refuse Axolotl settings that distillation cannot honour.

    Raises:
        ConfigConflictError
    """
    if cfg.get("rl"):
        raise ConfigConflictError(
            f"rl: {getattr(cfg['rl'], 'value', cfg['rl'])} selects another trainer, and distillation "
            "would be ignored. Remove rl:, or remove the distillation: block."
        )
    if cfg.get("sample_packing") or cfg.get("eval_sample_packing"):
        raise ConfigConflictError(
            "sample_packing: true packs several rows into one sequence, while every row is rolled "
            "out from its own prompt. Set sample_packing: false (and eval_sample_packing: false)."
        )
    if cfg.get("streaming") or cfg.get("pretraining_dataset"):
        raise ConfigConflictError(
            "streaming / pretraining_dataset give rows without prompts and without a length. Use "
            "datasets: with a chat or instruction format."
        )
    for key in ("context_parallel_size", "tensor_parallel_size"):
        if (cfg.get(key) or 1) > 1:
            raise ConfigConflictError(
                f"{key}: {cfg[key]} splits a sequence or a layer over devices, which rollouts do not "
                f"support. Set {key}: 1."
            )
    if str(cfg.get("excess_length_strategy") or "drop").lower() == "truncate":
        raise ConfigConflictError(
            "excess_length_strategy: truncate cuts long rows, also inside their prompts, which would "
            "then be continued mid-sentence. Set excess_length_strategy: drop and raise sequence_len."
        )
    save, evaluate = cfg.get("save_steps"), cfg.get("eval_steps")
    if cfg.get("load_best_model_at_end") and not evaluate:
        raise ConfigConflictError(
            "load_best_model_at_end: true, but nothing is evaluated on the way: eval_steps is not set. "
            "Set it (with test_datasets: or val_set_size:), or load_best_model_at_end: false."
        )
    if cfg.get("load_best_model_at_end") and not (save and save % evaluate == 0):
        raise ConfigConflictError(
            f"load_best_model_at_end: true, but save_steps: {save} is no multiple of eval_steps: "
            f"{evaluate}; Axolotl would switch it off without a word. Make it one."
        )
    _check_precision(cfg, distillation)
    _check_prompts_only(cfg, distillation)
    _check_attention(cfg)
    _check_head_is_plain(cfg)
    if distillation.teacher.base_model and not distillation.method_row.needs_teacher:
        LOG.warning(
            "distillation.teacher is not used: method %s learns from the data set alone.",
            distillation.method,
        )
    unread = unread_keys(distillation)
    if unread:
        LOG.warning(
            "method %s does not read these keys of distillation:, which are set: %s.",
            distillation.method,
            ", ".join(unread),
        )
    if distillation.teacher.student_base:
        if not cfg.get("adapter"):
            raise ConfigConflictError(
                "distillation.teacher.student_base: true, but there is no adapter: that could be "
                "switched off. Set adapter: lora or qlora, or name a teacher by base_model."
            )
        if _learns_from_its_like(cfg, distillation):
            LOG.warning(
                "distillation.teacher.student_base: true with a fresh adapter: it changes nothing at "
                "first, so student and teacher are the same, the loss is zero, and there is nothing to "
                "learn but noise. Go on from a trained adapter (lora_model_dir), or name a teacher by "
                "base_model."
            )
    if distillation.method_row.needs_teacher and _same_model(
        cfg["base_model"], distillation.teacher.base_model
    ):
        LOG.warning(
            "distillation.teacher.base_model and base_model are the same (%s): this is "
            "self-distillation from a frozen copy.",
            cfg["base_model"],
        )


def _learns_from_its_like(cfg: Mapping[str, Any], distillation: Distillation) -> bool:
    """Is all that a new adapter learns from its own base's distributions?"""
    return (
        distillation.method_row.loss is LossRecipe.DIVERGENCE
        and not distillation.loss.ce_weight
        and not cfg.get("lora_model_dir")
    )


def _check_precision(cfg: Mapping[str, Any], distillation: Distillation) -> None:
    """fp16 needs a gradient scaler, which needs an accelerator and gradients that are not fp16."""
    pure = next((key for key in _MIXED if cfg.get(key)), None)
    if distillation.fp32_master_weights and pure:
        raise ConfigConflictError(
            f"{pure}: true asks for a model all in 16 bits, and distillation.fp32_master_weights: "
            f"true for float32 weights. Set {_MIXED[pure]}: true in its place (mixed "
            "precision), or remove the latter."
        )
    if distillation.fp32_master_weights and not (cfg.get("bf16") or cfg.get("fp16")):
        raise ConfigConflictError(
            "distillation.fp32_master_weights: true, but neither bf16 nor fp16 is: the weights are in "
            "float32 already. Remove it, or set bf16: true (mixed precision)."
        )
    if not cfg.get("fp16"):
        return
    if on_cpu():
        raise ConfigConflictError(
            "fp16: true (or bf16: auto, which becomes that here) needs an accelerator: on a CPU there "
            "is no fp16 mixed precision, and loss scaling would be left out. Set fp16: false, and "
            "bf16: true or false."
        )
    if not cfg.get("adapter") and not distillation.fp32_master_weights:
        raise ConfigConflictError(
            "fp16: true loads fp16 weights, whose fp16 gradients the gradient scaler refuses "
            "('Attempting to unscale FP16 gradients'). Set distillation.fp32_master_weights: true, or "
            "bf16: true, or train an adapter."
        )


def _check_prompts_only(cfg: Mapping[str, Any], distillation: Distillation) -> None:
    """Rows of prompts have a stand-in for a completion, which nothing may train on or measure."""
    if any(dataset.get("type") == DATASET_TYPE for dataset in cfg.get("test_datasets") or []):
        raise ConfigConflictError(
            f"test_datasets: type {DATASET_TYPE} has prompts without completions, and validation "
            "measures the loss on completions. Give rows with completions, or remove test_datasets."
        )
    if not any(dataset.get("type") == DATASET_TYPE for dataset in cfg.get("datasets") or []):
        return
    if distillation.method_row.needs_completions:
        raise ConfigConflictError(
            f"datasets: type {DATASET_TYPE} has prompts without completions, and method "
            f"{distillation.method!r} trains on the data set's completions. Use type: chat_template "
            "with rows that have them, or a method that samples all of its own (skd, on_policy_kd, "
            "seqkd)."
        )
    if cfg.get("val_set_size"):
        raise ConfigConflictError(
            f"val_set_size: {cfg['val_set_size']} splits validation rows off datasets:, of which some "
            f"(type {DATASET_TYPE}) have no completions to measure the loss on. Set val_set_size: 0, "
            "and give test_datasets: with completions if you want validation."
        )


def _check_attention(cfg: Mapping[str, Any]) -> None:
    implementation = cfg.get("attn_implementation")
    if implementation is not None and rollout_attention(implementation) is None:
        raise ConfigConflictError(
            f"attn_implementation: {implementation} takes no 4-D mask, which ragged rollouts need, "
            "and none is known that computes the same. Set attn_implementation: sdpa, eager, "
            "flash_attention_2, flash_attention_3 or flex_attention."
        )


def _check_device(device: str | None) -> None:
    present = present_devices()
    if device is not None and device not in present:
        raise ConfigConflictError(
            f"distillation.teacher.device: {device} is none of this machine's devices. Set one of "
            f"{', '.join(present)}, or remove it (beside the student)."
        )


def _check_softcap(
    model_key: str, config: PreTrainedConfig, key: str, implementation: str | None
) -> None:
    """Refuse SDPA, the default, where it would leave out a part of the model without a word."""
    if is_softcapped(config) and implementation in (None, "sdpa"):
        raise ConfigConflictError(
            f"{key}: {implementation or 'not set, which means sdpa'}, but the attention scores of "
            f"{model_key} ({config.model_type}) are softcapped, and transformers' SDPA leaves the "
            f"softcap out. Set {key}: eager, flash_attention_2 or flex_attention."
        )


def _check_head_is_plain(cfg: Mapping[str, Any]) -> None:
    """The loss and the rollout apply the output head themselves, without an adapter around it."""
    for key in ("lora_target_modules", "lora_modules_to_save"):
        names = cfg.get(key) or []
        names = [names] if isinstance(names, str) else names
        heads = [name for name in names if "lm_head" in name]
        if heads:
            raise ConfigConflictError(
                f"{key}: {heads} adapts or copies the output head, which the distillation loss "
                f"applies by itself. Remove {heads} from {key} (lora_target_linear: true leaves the "
                "head out)."
            )
    if cfg.get("adapter") not in (None, "lora", "qlora"):
        raise ConfigConflictError(
            f"adapter: {cfg['adapter']} changes the student outside its layers, which rollouts do "
            "not support. Use adapter: lora or qlora, or none."
        )


def _same_model(student: str, teacher: str | None) -> bool:
    if teacher is None:
        return False
    return student == teacher or (
        os.path.isdir(student) and os.path.isdir(teacher) and os.path.samefile(student, teacher)
    )


def check_models(
    cfg: Mapping[str, Any], distillation: Distillation, tokenizer: PreTrainedTokenizerBase
) -> Preflight:
    """Compare configurations and tokenizers of both models; reads no weights.

    Args:
        cfg: the Axolotl config.
        distillation: its typed block.
        tokenizer: the student's, as Axolotl set it up.

    Raises:
        ConfigConflictError, teacher.TeacherError, vocabulary.VocabularyError,
        rollout.lm.UnsupportedModelError
    """
    student = AutoConfig.from_pretrained(
        cfg.get("base_model_config") or cfg["base_model"],
        revision=cfg.get("revision_of_model"),
        trust_remote_code=bool(cfg.get("trust_remote_code")),
    )
    if tokenizer.pad_token_id is None:
        raise ConfigConflictError(
            "the student's tokenizer has no pad token, and rows of a batch are padded. Set "
            "special_tokens: {pad_token: ...} (it may be the EOS token)."
        )
    vocab_size = max(student.get_text_config().vocab_size, len(tokenizer))
    teacher_vocab = None
    require_cache_by_position("base_model", student)
    _check_softcap("base_model", student, "attn_implementation", cfg.get("attn_implementation"))
    _check_positions("base_model", student, distillation, cfg)
    if distillation.method_row.needs_teacher and distillation.teacher.student_base:
        teacher_vocab = tokenizer.get_vocab()
    elif distillation.method_row.needs_teacher:
        teacher = read_teacher_config(distillation.teacher)
        require_cache_by_position("distillation.teacher.base_model", teacher)
        _check_device(distillation.teacher.device)
        device = distillation.teacher.device or present_devices()[0]
        check_quantised_checkpoint(distillation.teacher, teacher, device)
        asked = distillation.teacher.attn_implementation or default_attention(teacher)
        _check_softcap(
            "distillation.teacher.base_model",
            teacher,
            "distillation.teacher.attn_implementation",
            asked,
        )
        _check_positions("distillation.teacher.base_model", teacher, distillation, cfg)
        teacher_vocab = read_teacher_tokenizer(distillation.teacher).get_vocab()
        shared = share_vocabulary(
            tokenizer.get_vocab(), teacher_vocab, vocab_size, teacher.get_text_config().vocab_size
        )
        check_top_k(distillation, shared)
    return Preflight(
        stop_token_ids=stop_set(cfg, distillation, tokenizer),
        student_vocab=tokenizer.get_vocab(),
        teacher_vocab=teacher_vocab,
    )


def warn_of_unknown_tokens(shared: SharedVocabulary) -> None:
    """Tokens that only the student knows train against rows of the teacher that nobody trained."""
    if shared.student_only:
        LOG.warning(
            "%d token(s) of the student are unknown to the teacher's tokenizer (first: %s): where "
            "the data uses them, the teacher's distributions mean nothing.",
            len(shared.student_only),
            ", ".join(map(repr, shared.student_only[:5])),
        )


def check_top_k(distillation: Distillation, shared: SharedVocabulary) -> None:
    """K beyond the vocabulary would accept everything, which is another method or no gate."""
    rollout = distillation.rollout
    verifies = distillation.method_row.source is Source.INTERLEAVED
    top_k = rollout.teacher_top_k
    largest = top_k if isinstance(top_k, int) else top_k.largest
    if verifies and rollout.acceptance == "top_k" and largest > shared.size:
        raise ConfigConflictError(
            f"distillation.rollout.teacher_top_k is {top_k}, but the "
            f"shared vocabulary has {shared.size} tokens. Set 1 to {shared.size}; to accept every "
            "proposal use method: on_policy_kd."
        )
    gate = distillation.active_gate
    if gate is not None and gate.rule == "top_k" and gate.top_k > shared.size:
        raise ConfigConflictError(
            f"distillation.gate.top_k is {gate.top_k}, but the shared vocabulary has {shared.size} "
            "tokens: the gate would accept every token. Lower it, or remove the gate."
        )


def _check_positions(
    key: str, config: PreTrainedConfig, distillation: Distillation, cfg: Mapping[str, Any]
) -> None:
    """Do rollouts, and the data set's own rows where a model reads them, fit its positions?"""
    positions, why = usable_positions(config.get_text_config())
    if positions is None:
        return
    rollout, method = distillation.rollout, distillation.method_row
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if method.rolls_out and longest > positions:
        raise ConfigConflictError(
            f"distillation.rollout: max_prompt_tokens ({rollout.max_prompt_tokens}) + max_new_tokens "
            f"({rollout.max_new_tokens}) = {longest}, but {key} has {positions} positions{why}. Lower "
            "one of the two."
        )
    validates = cfg.get("val_set_size") or cfg.get("test_datasets")
    if (method.needs_completions or validates) and (cfg.get("sequence_len") or 0) > positions:
        raise ConfigConflictError(
            f"sequence_len: {cfg['sequence_len']}, but {key} has {positions} positions{why}, and "
            "it reads the data set's own rows (training or validation). Lower sequence_len."
        )


def usable_positions(config: PreTrainedConfig) -> tuple[int | None, str]:
    """Positions that a rollout may use, and why they are fewer than the model's, if they are.

    Rotary embeddings that depend on the length of the sequence change all keys once it outgrows the
    original length, those already in a cache as well.
    """
    positions = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type")
        if kind in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", positions
            )
            return original, f" before its {kind} rotary embedding changes with the length"
    return positions, ""


def stop_set(
    cfg: Mapping[str, Any],
    distillation: Distillation,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, ...]:
    """EOS, Axolotl's `eot_tokens` and `rollout.stop_token_ids`, ascending.

    Raises:
        ConfigConflictError: empty, or an id or token that does not exist.
    """
    stops = set(distillation.rollout.stop_token_ids)
    vocab = tokenizer.get_vocab()
    unknown = sorted(stops - set(vocab.values()))
    if unknown:
        raise ConfigConflictError(
            f"distillation.rollout.stop_token_ids: {unknown} are no ids of the student's tokenizer, "
            f"which has {len(vocab)} tokens."
        )
    for token in cfg.get("eot_tokens") or []:
        if token not in vocab:
            raise ConfigConflictError(
                f"eot_tokens: {token!r} is no token of the student's tokenizer, so nothing would ever "
                "stop at it. Name one that is, or add it under tokens:."
            )
        stops.add(vocab[token])
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ConfigConflictError(
            "the stop set is empty: the tokenizer has no EOS token. Set special_tokens: {eos_token}, "
            "eot_tokens: or distillation.rollout.stop_token_ids."
        )
    return tuple(sorted(stops))


def sampling_params(distillation: Distillation, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """The engine's view of `distillation.rollout`; a K that changes over the run is the first one."""
    rollout = distillation.rollout
    top_k = rollout.teacher_top_k
    return SamplingParams(
        num_draft_tokens=rollout.num_draft_tokens,
        teacher_top_k=top_k if isinstance(top_k, int) else top_k.start,
        student_temperature=rollout.student_temperature,
        student_top_p=rollout.student_top_p,
        teacher_temperature=rollout.teacher_temperature,
        teacher_top_p=rollout.teacher_top_p,
        stop_token_ids=stop_token_ids,
        acceptance_top_p=rollout.acceptance_top_p,
        acceptance_min_p=rollout.acceptance_min_p,
        replacement=rollout.replacement,
        bonus_token=rollout.bonus_token,
    )
