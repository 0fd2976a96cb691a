"""A KV cache for ragged speculation: the token at position p of a row always lives in slot p.

Rejected tokens leave stale slots behind. They are never visible (a query at position p sees slots
<= p only) and are overwritten when their position is filled again, so nothing is cropped, rolled or
padded, and sliding windows stay exact; the same holds for a row that takes a finished one's place.
Works with stock transformers through the public `Cache`.

Legend: R rows, Q tokens fed per row, S slots, h KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from axolotl_skd.rollout.graphs import GraphedForwards

# Attention looks at a number of slots rounded up to this, so that few distinct shapes occur.
VIEW_MULTIPLE = 32


class SlotLayer(CacheLayerMixin):
    """One decoder layer's keys and values, each [R, h, S, D], allocated on first use."""

    is_sliding = False  # a sliding layer keeps all slots too; its window is in the mask

    def __init__(self, placement: _Placement) -> None:
        super().__init__()
        self._placement = placement

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, slots = self._placement.num_rows, self._placement.num_slots
        heads, key_size, value_size = (
            key_states.shape[1],
            key_states.shape[3],
            value_states.shape[3],
        )
        # Zeros, not garbage: a masked slot holding NaN would poison the product 0 * NaN.
        self.keys = key_states.new_zeros(rows, heads, slots, key_size)
        self.values = value_states.new_zeros(rows, heads, slots, value_size)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        placement = self._placement
        # Layers of a model that is spread over devices keep their keys where they compute.
        rows, slots = placement.rows.to(self.device), placement.slots.to(self.device)
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        if placement.view is None:  # a prompt sees itself alone
            return key_states, value_states
        return self.keys[:, :, : placement.view], self.values[:, :, : placement.view]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        view = self._placement.view
        return (query_length if view is None else view), 0

    def get_seq_length(self) -> int:
        return (self._placement.view or 0) if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self._placement.num_slots


class _Placement:
    """Where the tokens of the current forward go; shared by all layers of one cache."""

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.rows: Tensor | None = None  # int64 [r, 1]
        self.slots: Tensor | None = None  # int64 [r, Q]
        self.view: int | None = None  # slots that attention sees; None: only what is fed


class SlotCache(Cache):
    """KV cache of one model for at most `num_rows` rows of at most `num_slots` tokens."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_slots: int,
        view_multiple: int = VIEW_MULTIPLE,
        graphed: GraphedForwards | None = None,
    ) -> None:
        """
        Args:
            num_layers: of the decoder.
            num_rows, num_slots: largest extent.
            view_multiple: attention sees a multiple of so many slots.
            graphed: the graphs that write into this cache.
        """
        self.placement = _Placement(num_rows, num_slots)
        self.graphed = graphed
        self._view_multiple = view_multiple
        super().__init__(layers=[SlotLayer(self.placement) for _ in range(num_layers)])

    def view(self, longest: int) -> int:
        """Slots that attention has to see so that `longest` tokens of a row are among them."""
        rounded = -(-longest // self._view_multiple) * self._view_multiple
        return min(rounded, self.placement.num_slots)

    def place(self, positions: Tensor, view: int) -> None:
        """Announce the next forward: of all rows, each seeing its `view` first slots.

        Args:
            positions: int64 [R, Q].
            view: from `view`.
        """
        placement = self.placement
        placement.rows = torch.arange(len(positions), device=positions.device)[:, None]
        placement.slots, placement.view = positions, view

    def place_prompts(self, rows: Tensor, width: int) -> None:
        """Announce the next forward: of the tokens 0 .. width - 1 of some rows (int64 [r])."""
        placement = self.placement
        placement.rows = rows[:, None]
        placement.slots = torch.arange(width, device=rows.device).expand(len(rows), -1)
        placement.view = None

    def keep_rows(self, index: Tensor) -> None:
        """Drop all rows but those in `index` (int64 [R'])."""
        self.placement.num_rows = len(index)
        self.placement.rows = self.placement.slots = None  # of a graph's memory, perhaps
        if self.graphed is not None:
            self.graphed.forget()
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[index.to(layer.device)]
                layer.values = layer.values[index.to(layer.device)]
