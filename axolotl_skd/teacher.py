"""The frozen teacher: cheap checks before anything is loaded, then loading, freezing, placing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.quantizers import AutoHfQuantizer

from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.rollout.attention import default_attention
from axolotl_skd.rollout.lm import rollout_mode


class TeacherError(ValueError):
    """The teacher cannot be found, read or used."""


# What its kernels are called on the package index, where transformers cannot be asked by name.
_KERNELS = {"gptq": "gptqmodel optimum", "awq": "gptqmodel"}


def _hub_arguments(config: TeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _reason(error: Exception) -> str:
    """Its first line, and the next where the first one only announces it."""
    lines = [line.strip() for line in (str(error).strip() or repr(error)).splitlines()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _unreadable(config: TeacherConfig, what: str, error: Exception) -> TeacherError:
    reason = _reason(error)
    if Path(str(config.base_model), "adapter_config.json").exists():
        reason = (
            "it holds an adapter: name it by distillation.teacher.adapter, and the model it was "
            "trained on by base_model"
        )
    if str(config.base_model).startswith((".", "/", "~")) and not Path(config.base_model).exists():
        reason = f"there is no such folder; looked from {Path.cwd()}"
    return TeacherError(
        f"distillation.teacher.base_model: the {what} of {config.base_model!r} could not be read "
        f"({type(error).__name__}: {reason}). "
        "Give a folder that holds a saved Hugging Face model, or the id of one on the hub that this "
        "machine may read (network, HF_TOKEN, HF_HUB_OFFLINE)."
    )


def _too_large(config: TeacherConfig, what: str) -> TeacherError:
    helps = ["a smaller teacher"]
    if not (config.device or config.device_map):
        helps.insert(0, "device: or device_map: auto (other devices)")
    if config.quantised is None:
        helps.insert(0, "load_in_4bit: true")
    return TeacherError(
        f"distillation.teacher: {config.base_model!r} does not fit beside what is on the device: "
        f"{what}. What helps: {'; '.join(helps)}."
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


def check_quantised_checkpoint(
    config: TeacherConfig, teacher: PreTrainedConfig, device: str
) -> None:
    """Refuse a checkpoint that comes quantised (GPTQ, AWQ, ...) and cannot be run here as it is.

    Args:
        config: `distillation.teacher`.
        teacher: its configuration, as `read_teacher_config` returns it.
        device: where it is to run.

    Raises:
        TeacherError: its kernels are not installed, or it is to be quantised a second time or moved.
    """
    settings = getattr(teacher, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method", "bitsandbytes")  # whose first checkpoints do not say so
    method = str(getattr(method, "value", method))
    if config.offload:
        raise TeacherError(
            "distillation.teacher.offload: true moves the teacher to and fro, but the checkpoint "
            f"{config.base_model!r} is quantised ({method}), and its kernels stay where they are. "
            "Remove offload, or name an unquantised checkpoint."
        )
    if config.quantised:
        raise TeacherError(
            f"distillation.teacher.{config.quantised} is set, but the checkpoint {config.base_model!r} "
            f"is quantised already ({method}). Remove the key, or name an unquantised checkpoint."
        )
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except (ImportError, ValueError, RuntimeError) as error:
        hint = f" (pip install {_KERNELS[method]})" if method in _KERNELS else ""
        raise TeacherError(
            f"distillation.teacher.base_model: {config.base_model!r} is quantised by {method}, which "
            f"cannot run here ({type(error).__name__}: {error}). Install its kernels{hint}, or name "
            "the unquantised checkpoint and set load_in_4bit, load_in_8bit or torchao."
        ) from None


def is_quantised(config: TeacherConfig) -> bool:
    """Will its weights be quantised, because it was asked for or because they come so?"""
    if config.quantised is not None:
        return True
    return getattr(read_teacher_config(config), "quantization_config", None) is not None


def quantization_config(config: TeacherConfig) -> BitsAndBytesConfig | TorchAoConfig | None:
    """bitsandbytes' or torchao's settings, None unless asked for."""
    if config.torchao:
        return TorchAoConfig(_torchao_weights(config.torchao))
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


def _torchao_weights(kind: str) -> Any:
    # Imported where it is asked for: torchao looks for its kernels, with warnings where it has none.
    from torchao import quantization

    return {
        "int8": quantization.Int8WeightOnlyConfig,
        "int4": quantization.Int4WeightOnlyConfig,
        "float8": quantization.Float8WeightOnlyConfig,
    }[kind]()


def load_teacher(config: TeacherConfig, device: torch.device | None) -> PreTrainedModel:
    """Load the teacher, frozen and in evaluation mode.

    Args:
        config: `distillation.teacher`.
        device: where to put it unless the config says otherwise; None leaves that to ZeRO-3, which
            spreads every model while it is loaded.

    Returns:
        the causal LM; with an adapter, the one inside it, whose layers have the adapter in them.

    Raises:
        TeacherError: its weights or its adapter's cannot be read.
    """
    quantization, place = quantization_config(config), config.device or device
    arguments = _hub_arguments(config)
    attention = config.attn_implementation or default_attention(read_teacher_config(config))
    if attention is not None:
        arguments["attn_implementation"] = attention
    if quantization is not None:
        arguments["quantization_config"] = quantization
    try:
        teacher, info = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            output_loading_info=True,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            device_map=config.device_map or (place and {"": place}),
            **arguments,
        )
    except torch.OutOfMemoryError as error:
        raise _too_large(config, str(error)) from error
    except ImportError as error:
        asked = [
            key for key in ("attn_implementation", config.quantised) if key and getattr(config, key)
        ]
        raise TeacherError(
            f"distillation.teacher.{' / '.join(asked)}: what {config.base_model!r} needs so is not "
            f"installed ({error}). Install it, or change them."
        ) from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if config.torchao and isinstance(
            error, RuntimeError
        ):  # transformers' word for a failed one
            raise TeacherError(
                f"distillation.teacher.torchao: {config.torchao} could not be applied to "
                f"{config.base_model!r} (above it is said why, e.g. a kernel that is not installed: "
                f"{_reason(error)}). Set torchao: int8, load_in_4bit or load_in_8bit."
            ) from None
        raise _unreadable(config, "weights", error) from None
    if config.device_map and any(weight.is_meta for weight in teacher.parameters()):
        raise _too_large(
            config,
            f"device_map: {config.device_map} leaves a part of it on the CPU or the disk, from where "
            "its layers would be fetched for every token",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and warns.
        raise _unreadable(config, "weights", KeyError(f"not in the checkpoint: {missing[:5]}"))
    if config.adapter:
        teacher = _with_adapter(teacher, config)
    teacher.requires_grad_(False)
    return teacher.eval()


def _with_adapter(teacher: PreTrainedModel, config: TeacherConfig) -> PreTrainedModel:
    """The model with the adapter in its layers: not merged, which would round."""
    try:
        adapted = PeftModel.from_pretrained(teacher, config.adapter, is_trainable=False)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise TeacherError(
            f"distillation.teacher.adapter: {config.adapter!r} could not be read as an adapter of "
            f"{config.base_model!r} ({type(error).__name__}: {_reason(error)}). Give a folder with "
            "adapter_config.json and its weights, or a hub id, and the base_model it was trained on."
        ) from None
    if not isinstance(adapted.base_model, BaseTuner):
        raise TeacherError(
            f"distillation.teacher.adapter: {config.adapter!r} is of type "
            f"{adapted.active_peft_config.peft_type.value}, which works outside the layers. Give a "
            "LoRA adapter, or a merged checkpoint."
        )
    return adapted.get_base_model()


def base_alone(
    student: PeftModel, precision: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    """Contexts in which the student computes as its base without adapter: `student_base`.

    Args:
        student: whose layers are switched; afterwards they are as before.
        precision: the student's own, so that both compute alike.

    Raises:
        TeacherError: the adapter trains biases of the base, which cannot be switched off.
    """
    biases = {getattr(one, "bias", "none") for one in student.peft_config.values()} - {"none"}
    if biases:
        raise TeacherError(
            "distillation.teacher.student_base: the adapter trains biases of the base itself "
            f"({', '.join(biases)}), so there is nothing to switch back to. Train LoRA without "
            "biases, or name a teacher by base_model."
        )

    @contextmanager
    def alone() -> Iterator[None]:
        # Not PeftModel.disable_adapter, which first inspects every layer: this runs often.
        student.base_model.disable_adapter_layers()
        try:
            with rollout_mode(student), precision():  # the teacher has no dropout
                yield
        finally:
            student.base_model.enable_adapter_layers()

    return alone
