"""Grouped-query attention without copies: the definition's result, and none of the copies.

The reference is written from the definition in float64: keys and values repeated for every query
head, scores, softmax over what the mask shows, weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from axolotl_skd.rollout.attention import (
    GROUPED_SDPA,
    attention_of,
    grouped_sdpa,
    rollout_attention,
)
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM, UnsupportedModelError
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, Rollout, SamplingParams
from tests.rollout.tiny import STOP_IDS, one_thread, random_prompts, tiny_model


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


# --- grouped_sdpa -----------------------------------------------------------------------------


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[B, Q, h, D_v] in float64, head by head."""
    rows, heads, num_queries, _ = query.shape
    group = heads // key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    output = torch.zeros(rows, num_queries, heads, value.shape[3], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            scores = query[row, head].double() @ key[row, head].T * scaling
            weights = scores.masked_fill(~mask[row, 0], -math.inf).softmax(-1)
            output[row, :, head] = weights @ value[row, head]
    return output


class Module(nn.Module):
    """What stock attention asks of the layer it is called for."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def inputs(
    groups: int,
    num_queries: int,
    *,
    rows: int = 2,
    kv_heads: int = 3,
    slots: int = 11,
    key_size: int = 8,
    value_size: int = 8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and a random mask that shows every query something."""
    generator = torch.Generator().manual_seed(groups + 10 * num_queries)
    query, key, value = (
        torch.randn(shape, generator=generator)
        for shape in (
            (rows, groups * kv_heads, num_queries, key_size),
            (rows, kv_heads, slots, key_size),
            (rows, kv_heads, slots, value_size),
        )
    )
    mask = torch.rand(rows, 1, num_queries, slots, generator=generator) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    return query, key, value, mask


@pytest.mark.parametrize("value_size", [8, 5])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_attention_is_attention(groups: int, num_queries: int, value_size: int) -> None:
    query, key, value, mask = inputs(groups, num_queries, value_size=value_size)
    for scaling in (None, 0.3):
        got, weights = grouped_sdpa(Module(groups), query, key, value, mask, scaling=scaling)
        expected = reference(query, key, value, mask, scaling or 8**-0.5)
        assert weights is None
        assert got.shape == expected.shape
        assert torch.allclose(got.double(), expected, rtol=0, atol=1e-6)


def test_no_slot_is_seen_that_the_mask_hides() -> None:
    """Not a number there, or a large one, changes nothing; where it is seen it would."""
    query, key, value, mask = inputs(2, 3)
    mask[..., 7:] = False
    before, _ = grouped_sdpa(Module(2), query, key, value, mask)
    key[:, :, 7:], value[:, :, 7:] = 1e4, -1e4
    after, _ = grouped_sdpa(Module(2), query, key, value, mask)
    assert torch.equal(before, after)
    value[:, :, 0] += 1
    assert not torch.equal(after, grouped_sdpa(Module(2), query, key, value, mask)[0])


@pytest.mark.parametrize("groups", [1, 4])
def test_without_a_mask_stock_attention_answers(groups: int) -> None:
    """A prompt: causal by itself."""
    query, key, value, _ = inputs(groups, 6, slots=6)
    got, _ = grouped_sdpa(Module(groups), query, key, value, None)
    stock, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(groups), query, key, value, None)
    assert torch.equal(got, stock)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    expected = reference(query, key, value, causal, 8**-0.5)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


@pytest.mark.parametrize("num_queries", [1, 3])
def test_keys_and_values_are_not_repeated(num_queries: int) -> None:
    query, key, value, mask = inputs(
        4, num_queries, kv_heads=2, slots=256, key_size=32, value_size=32
    )
    with LargestTensor() as ours:
        grouped_sdpa(Module(4), query, key, value, mask)
    with LargestTensor() as stock:
        ALL_ATTENTION_FUNCTIONS["sdpa"](Module(4), query, key, value, mask)
    assert stock.num_elements >= 4 * key.numel()  # the watch sees it where it happens
    assert ours.num_elements <= key.numel()


# --- which attention a rollout takes ----------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "plain", "softcapped"),
    [
        ("eager", "eager", "eager"),
        # Stock SDPA leaves the softcap out: what it computes is not the model.
        ("sdpa", GROUPED_SDPA, None),
        ("flash_attention_2", GROUPED_SDPA, "eager"),
        ("flash_attention_3", GROUPED_SDPA, "eager"),
        ("kernels-community/vllm-flash-attn3", GROUPED_SDPA, "eager"),
        ("flex_attention", GROUPED_SDPA, "eager"),
        ("paged_attention", None, None),
        ("xformers", None, None),
        ("sage", None, None),
        (None, None, None),
    ],
)
def test_table_of_attentions(own: str | None, plain: str | None, softcapped: str | None) -> None:
    assert rollout_attention(own) == plain
    assert rollout_attention(own, softcapped=False) == plain
    assert rollout_attention(own, softcapped=True) == softcapped


def test_attention_is_another_inside_alone() -> None:
    config = LlamaConfig()
    config._attn_implementation = "flash_attention_2"
    with attention_of(config, "eager"):
        assert config._attn_implementation == "eager"
        with attention_of(config, GROUPED_SDPA):
            assert config._attn_implementation == GROUPED_SDPA
        assert config._attn_implementation == "eager"
    assert config._attn_implementation == "flash_attention_2"


def test_attention_is_restored_after_an_exception() -> None:
    config = LlamaConfig()
    config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="boom"), attention_of(config, "eager"):
        raise RuntimeError("boom")
    assert config._attn_implementation == "sdpa"


PARAMS = SamplingParams(3, 220, 1.0, 0.9, 0.7, 0.8, STOP_IDS)


# Gemma-2's own softcap of 50 is far above the scores of a tiny model.
SOFTCAP = {"gemma2": {"attn_logit_softcapping": 0.5}}


def roll_out(family: str, own: str, method: str, **options: Any) -> Rollout:
    """With two models of the family that believe to compute with `own`."""
    options = {**SOFTCAP.get(family, {}), **options}
    models = [tiny_model(family, seed=seed, sharpness=5.0, **options) for seed in (1, 2)]
    for model in models:
        model.config._attn_implementation = own
    prompts = Prompts(
        tuple(map(torch.tensor, random_prompts(5, [1, 25, 7]))),
        row_streams(3, 1, torch.arange(3)),
        torch.tensor([20, 20, 20]),
    )
    result = getattr(RolloutEngine(*map(CausalLM, models)), method)(prompts, PARAMS)
    assert [model.config._attn_implementation for model in models] == [own, own]
    return result


@pytest.mark.parametrize("method", ["interleave", "sample_student"])
@pytest.mark.parametrize(
    ("family", "same"),
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")],
)
def test_flash_attention_rolls_out_what_it_trains(family: str, same: str, method: str) -> None:
    """flash-attn is not needed for it; with Gemma-2's softcap, which SDPA has not."""
    got, expected = (roll_out(family, own, method) for own in ("flash_attention_2", same))
    assert torch.equal(got.completion_ids, expected.completion_ids)
    assert torch.equal(got.accepted_mask, expected.accepted_mask)
    assert len(set(got.completion_ids.flatten().tolist())) > 10


def test_the_softcap_matters() -> None:
    """Else the case above would show nothing."""
    capped, ignored = (
        roll_out("gemma2", "eager", "interleave", attn_logit_softcapping=cap) for cap in (0.5, None)
    )
    assert not torch.equal(capped.completion_ids, ignored.completion_ids)


def test_attention_without_the_softcap_is_no_attention_of_the_model() -> None:
    with pytest.raises(UnsupportedModelError, match="'sdpa' leaves out the softcap of a 'gemma2'"):
        roll_out("gemma2", "sdpa", "interleave")
