"""How much room a teacher's weights will take, known from its configuration alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from axolotl_skd.config_blocks import TeacherConfig

# Bytes a number of the linear layers. Of 4-bit ones each block of 64 has a scale: a byte, with float32
# ones for 256 of them, or in float32 itself.
_INT8, _INT4 = 1.0, 0.5
_SCALES = {True: (1 + 4 / 256) / 64, False: 4 / 64}


def bytes_to_load(config: TeacherConfig, teacher: PreTrainedConfig) -> int | None:
    """Of weights as they will be stored; None for a checkpoint that comes quantised.

    Args:
        config: `distillation.teacher`.
        teacher: its configuration, as `teacher.read_teacher_config` returns it.
    """
    if getattr(teacher, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            teacher, trust_remote_code=config.trust_remote_code
        )
    dtype = teacher.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    size = (dtype or torch.float32).itemsize
    total = sum(parameter.numel() for parameter in model.parameters())
    # Quantisers leave embeddings, norms and the output head as they are.
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    )
    return int((total - linear) * size + linear * _linear_bytes(config, size))


def _linear_bytes(config: TeacherConfig, size: int) -> float:
    if config.load_in_4bit:
        return _INT4 + _SCALES[config.bnb_4bit_use_double_quant]
    if config.load_in_8bit or config.torchao in ("int8", "float8"):
        return _INT8
    return _INT4 + _SCALES[False] if config.torchao == "int4" else size
