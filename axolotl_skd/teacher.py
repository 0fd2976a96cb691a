"""The frozen teacher: cheap checks before anything is loaded, then loading, freezing, placing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from axolotl_skd.config import TeacherConfig


class TeacherError(ValueError):
    """The teacher cannot be found, read or used."""


def _hub_arguments(config: TeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _unreadable(config: TeacherConfig, what: str, error: Exception) -> TeacherError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    if str(config.base_model).startswith((".", "/", "~")) and not Path(config.base_model).exists():
        reason = f"there is no such folder; looked from {Path.cwd()}"
    return TeacherError(
        f"distillation.teacher.base_model: the {what} of {config.base_model!r} could not be read "
        f"({type(error).__name__}: {reason}). "
        "Give a folder that holds a saved Hugging Face model, or the id of one on the hub that this "
        "machine may read (network, HF_TOKEN, HF_HUB_OFFLINE)."
    )


def read_teacher_config(config: TeacherConfig) -> PreTrainedConfig:
    """The teacher's architecture, without its weights."""
    try:
        return AutoConfig.from_pretrained(config.base_model, **_hub_arguments(config))
    except (OSError, ValueError) as error:
        raise _unreadable(config, "configuration", error) from None


def read_teacher_tokenizer(config: TeacherConfig) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, to be compared with the student's."""
    try:
        return AutoTokenizer.from_pretrained(config.base_model, **_hub_arguments(config))
    except (OSError, ValueError) as error:
        raise _unreadable(config, "tokenizer", error) from None


def quantization_config(config: TeacherConfig) -> BitsAndBytesConfig | None:
    """bitsandbytes settings, None unless asked for."""
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=_compute_dtype(config),
        )
    return None


def _compute_dtype(config: TeacherConfig) -> torch.dtype | None:
    """Of 4-bit products: as set, else as the weights would have been loaded."""
    name = config.bnb_4bit_compute_dtype or config.dtype
    return read_teacher_config(config).dtype if name == "auto" else getattr(torch, name)


def load_teacher(config: TeacherConfig, device: torch.device) -> PreTrainedModel:
    """Load the teacher, frozen and in evaluation mode.

    Args:
        config: `distillation.teacher`.
        device: where to put it unless the config says otherwise.

    Raises:
        TeacherError: its weights cannot be read.
    """
    quantization = quantization_config(config)
    arguments = _hub_arguments(config)
    if config.attn_implementation:
        arguments["attn_implementation"] = config.attn_implementation
    if quantization is not None:
        arguments["quantization_config"] = quantization
    try:
        teacher, info = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            output_loading_info=True,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            device_map={"": config.device or device},
            **arguments,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(config, "weights", error) from None
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and warns.
        raise _unreadable(config, "weights", KeyError(f"not in the checkpoint: {missing[:5]}"))
    teacher.requires_grad_(False)
    return teacher.eval()
