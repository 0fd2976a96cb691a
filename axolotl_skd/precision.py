"""Weights that are finer than the arithmetic: float32 masters, and a warning where they are missing.

Axolotl loads a `bf16: true` model with bf16 linear layers and trains those very weights. A bf16 number
has 8 significant bits, so an update smaller than 1/512 of a weight is rounded away, and at the learning
rates of distillation most are. Float32 weights under the trainer's autocast keep the updates, while
matrix products still run in bf16 or fp16 (Micikevicius et al., https://arxiv.org/abs/1710.03740).
"""

from __future__ import annotations

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor, nn

LOG = get_logger(__name__)

# Of each tensor so many numbers are looked at, evenly spaced.
_SAMPLE = 4096
# Warn where more than this share of the updates would be lost.
_LOST_SHARE = 0.5


def raise_to_float32(model: nn.Module) -> int:
    """Make float32 masters of all trainable weights, in place; the frozen ones stay as they are.

    Args:
        model: before an optimizer or a wrapper holds its parameters.

    Returns:
        how many numbers were raised.
    """
    coarse = [p for p in model.parameters() if p.requires_grad and _is_coarse(p)]
    for parameter in coarse:
        parameter.data = parameter.data.float()
    return sum(parameter.numel() for parameter in coarse)


def warn_of_lost_updates(model: nn.Module, learning_rate: float) -> None:
    """Say so where most updates of the size of the learning rate would not change a 16-bit weight.

    Adam's have about that size at first, and are smaller later.
    """
    share = lost_share(model, learning_rate)
    if share > _LOST_SHARE:
        LOG.warning(
            "trainable weights are held in 16 bits, and an update of learning_rate = %g would be "
            "rounded away in %.0f %% of them: they would hardly learn. Set "
            "distillation.fp32_master_weights: true (or bf16: false), unless the optimizer itself "
            "compensates for rounding.",
            learning_rate,
            100 * share,
        )


@torch.no_grad()
def lost_share(model: nn.Module, update: float) -> float:
    """Share of the trainable 16-bit weights, in a sample, that subtracting `update` does not change.

    Zero if no trainable weights are that coarse.
    """
    lost = total = 0
    for parameter in model.parameters():
        if parameter.requires_grad and _is_coarse(parameter):
            weights = _sampled(parameter)
            share = float(((weights.float() - update).to(weights.dtype) == weights).float().mean())
            lost += share * parameter.numel()
            total += parameter.numel()
    return lost / total if total else 0.0


def _is_coarse(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _sampled(parameter: nn.Parameter) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: -(-len(flat) // _SAMPLE)]
