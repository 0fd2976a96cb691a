"""Attention masks for the slot == position cache, full and sliding layers.

Legend: B rows, Q queries per row, S visible slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_slots(positions: Tensor, num_slots: int, window: int | None = None) -> Tensor:
    """Which slots a query may see: its own and earlier ones, within its window.

    Args:
        positions: int64 [B, Q] of the queries.
        num_slots: S.
        window: sliding window size, None for full attention.

    Returns:
        bool [B, 1, Q, S], True = visible.
    """
    queries = positions[:, None, :, None]
    slots = torch.arange(num_slots, device=positions.device)
    visible = slots <= queries
    return visible if window is None else visible & (slots > queries - window)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as numbers to add to attention scores, which eager attention needs."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)
