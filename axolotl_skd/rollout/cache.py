"""A KV cache for ragged speculation: the token at position p of a row always lives in slot p.

Rejected tokens leave stale slots behind. They are never visible (a query at position p sees slots
<= p only) and are overwritten when their position is filled again, so nothing is cropped, rolled or
padded, and sliding windows stay exact. Works with stock transformers through the public `Cache`.

Legend: B rows, Q tokens fed per row, S slots, h KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Attention looks at a number of slots rounded up to this, so that few distinct shapes occur.
VIEW_MULTIPLE = 32


class SlotLayer(CacheLayerMixin):
    """One decoder layer's keys and values, each [B, h, S, D], allocated on first use."""

    is_sliding = False  # a sliding layer keeps all slots too; its window is in the mask

    def __init__(self, placement: _Placement) -> None:
        super().__init__()
        self._placement = placement

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, key_size = key_states.shape
        slots = self._placement.num_slots
        # Zeros, not garbage: a masked slot holding NaN would poison the product 0 * NaN.
        self.keys = key_states.new_zeros(rows, heads, slots, key_size)
        self.values = value_states.new_zeros(rows, heads, slots, value_states.shape[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, slots, view = self._placement.rows, self._placement.slots, self._placement.view
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :view], self.values[:, :, :view]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._placement.view, 0

    def get_seq_length(self) -> int:
        return self._placement.view if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self._placement.num_slots


class _Placement:
    """Where the tokens of the current forward go; shared by all layers of one cache."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.rows: Tensor | None = None
        self.slots: Tensor | None = None
        self.view = 0


class SlotCache(Cache):
    """KV cache of one model for B rows of at most `num_slots` tokens."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.placement = _Placement(num_slots)
        super().__init__(layers=[SlotLayer(self.placement) for _ in range(num_layers)])

    def place(self, positions: Tensor, longest: int) -> int:
        """Announce the positions of the next forward.

        Args:
            positions: int64 [B, Q].
            longest: an upper bound of `positions` + 1.

        Returns:
            the number of slots that attention will see.
        """
        placement = self.placement
        placement.slots = positions
        placement.rows = torch.arange(len(positions), device=positions.device)[:, None]
        rounded = -(-longest // VIEW_MULTIPLE) * VIEW_MULTIPLE
        placement.view = min(rounded, placement.num_slots)
        return placement.view

    def keep_rows(self, index: Tensor) -> None:
        """Drop all rows but those in `index` (int64 [B'])."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[index]
                layer.values = layer.values[index]
