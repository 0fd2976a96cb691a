"""Attention of a rollout: masks for the slot == position cache, and grouped queries without copies.

Ragged rows need a 4-D mask. Stock SDPA answers a mask by repeating keys and values once per query
head of their group, which for a whole cache costs more than the attention itself; packing the heads
of a group into the query axis computes the same product on the keys as they are. It is registered
beside the stock functions and chosen for the rollout's forwards only.

Legend: B rows, Q queries per row, S visible slots, h query heads, k KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED_SDPA = "axolotl_skd_grouped_sdpa"


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


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stock SDPA's result with a mask, without repeating keys and values.

    Args:
        query: [B, h, Q, D].
        key, value: [B, k, S, D], h a multiple of k.
        attention_mask: bool [B, 1, Q, S]; without one, stock SDPA itself answers (its own causality).

    Returns:
        [B, Q, h, D], None
    """
    if attention_mask is None or kwargs.get("position_bias") is not None:
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, heads, num_queries, size = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(rows, key.shape[1], groups * num_queries, size)
    if num_queries > 1 and groups > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    output = nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    output = output.reshape(rows, heads, num_queries, output.shape[-1])
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, grouped_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def rollout_attention(own: str | None, softcapped: bool = False) -> str | None:
    """The attention implementation of rollouts for a model that is trained with `own`.

    Eager stays eager; SDPA and the flash and flex kernels, which know no ragged 4-D mask, become
    grouped SDPA, or eager where scores are softcapped (Gemma-2).

    Returns:
        None if there is none that computes the same, or `own` is not what the model is: transformers'
        SDPA leaves out the softcap without a word.
    """
    known = own is not None and (own in ("eager", "sdpa", "flex_attention") or "flash" in own)
    if not known or (own == "sdpa" and softcapped):
        return None
    return "eager" if own == "eager" or softcapped else GROUPED_SDPA


def is_softcapped(config: PreTrainedConfig) -> bool:
    """Are attention scores squashed before the softmax?"""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def default_attention(config: PreTrainedConfig) -> str | None:
    """What to load a model with where nothing is asked for; None leaves it to transformers.

    Whose own choice, SDPA, would leave out a softcap.
    """
    return "eager" if is_softcapped(config) else None


@contextmanager
def attention_of(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    """Run a model's forwards inside with this implementation; its own is restored after."""
    own = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = own
