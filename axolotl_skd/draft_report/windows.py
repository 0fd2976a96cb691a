"""Sliding windows of a draft: how far assisted generation may go.

While it drafts, a cache keeps more than the window so that it can be rolled back. In some releases of
transformers (5.16 among them, https://github.com/huggingface/transformers/pull/48280) attention gets
all of that from the second token of a draft on: an error, or a silently worse draft. The teacher is
rolled back after every forward and stays right.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer


def draft_window(student: PreTrainedModel) -> int | None:
    """Tokens (prompt and completion) up to which the student drafts right, None without a bound."""
    layers = DynamicCache(config=student.config.get_text_config(decoder=True)).layers
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    return min(windows) if windows and not rolls_back_windows() else None


def rolls_back_windows() -> bool:
    """Does a cache that records its past hand out as many keys as the mask has columns?"""
    layer = DynamicSlidingWindowLayer(sliding_window=2)
    layer.activate_past_recording()
    state = torch.zeros(1, 1, 1, 1)
    for _ in range(4):
        columns, _offset = layer.get_mask_sizes(1)
        keys, _values = layer.update(state, state)
        if keys.shape[-2] != columns:
            return False
    return True
