"""Runs without an accelerator: what Axolotl has to be told so that they work."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import nn

LOG = get_logger(__name__)

# Triton kernels that Axolotl switches on for LoRA by itself; the plain modules compute the same.
_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def on_cpu() -> bool:
    """Is there no accelerator?"""
    return not torch.accelerator.is_available()


def fit_to_cpu(cfg: Any) -> None:
    """Keep ranks off accelerators that are not there, and Triton kernels off the CPU (in place)."""
    read_what_cpu_ranks_wrote()
    cfg.device_map = {"": "cpu"}  # Axolotl would map ranks to devices
    kernels = [key for key in _LORA_KERNELS if cfg.get(key)]
    if kernels:
        LOG.info("no accelerator: %s switched off", ", ".join(kernels))
    for key in kernels:
        cfg[key] = False


@cache
def read_what_cpu_ranks_wrote() -> None:
    """Let `torch.load` put tensors on "cpu:0", as accelerate calls the device of a CPU rank.

    transformers asks for that device when several ranks resume, and torch knows "cpu" alone.
    """

    def restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(100, lambda _storage: None, restore)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in evaluation mode (in place).

    On CPUs with AVX-512 it does so at the first forward, which here is a rollout's, for kernels that
    have no gradient, and leaves them so: layers below would get no gradient any more, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
