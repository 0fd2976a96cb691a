"""What a model holds that came from a checkpoint: its parameters, and the buffers saved with them.

Kernels of pre-quantised checkpoints (GPTQ, AWQ) keep their packed weights in buffers.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def held_weights(module: nn.Module) -> dict[str, Tensor]:
    """By name, each once."""
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def held_bytes(module: nn.Module) -> int:
    """Bytes of all of them as they are stored."""
    return sum(map(stored_bytes, held_weights(module).values()))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor as it is stored: what a quantised one wraps, not what it stands for.

    Of one that is spread over ranks, of all its parts together.
    """
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        # Where DeepSpeed has put a weight elsewhere, an empty one stands for it.
        packed = getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        return packed + _scale_bytes(getattr(tensor, "quant_state", None))
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _scale_bytes(state: QuantState | None) -> int:
    """Of the blocks of a 4-bit weight of bitsandbytes, which may be quantised themselves."""
    if state is None:
        return 0
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
