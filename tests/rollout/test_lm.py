"""The uniform view of a model: exact where it is accepted, refused where it could not be exact.

Proves: decoder + slot cache + head give the model's own logits for every supported family, in any
cut of the sequence; what the package does not know is refused with `UnsupportedModelError`; rollout
mode leaves no trace; masks and cache follow the definition slot == position.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from axolotl_skd.rollout.attention import additive, visible_slots
from axolotl_skd.rollout.cache import VIEW_MULTIPLE, SlotCache
from axolotl_skd.rollout.lm import CausalLM, Head, UnsupportedModelError, probe, rollout_mode
from tests.rollout.tiny import FAMILIES, VOCAB_SIZE, one_thread, random_prompts, tiny_model

SHARPNESS = 5.0


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


# --- rollout_mode -----------------------------------------------------------------------------


def model_with_dropout() -> PreTrainedModel:
    """In training mode, all but its last layer."""
    model = tiny_model("llama", seed=1, attention_dropout=0.5).train()
    model.model.layers[-1].eval()
    return model


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_rollout_mode_switches_dropout_and_gradients_off() -> None:
    model, ids = model_with_dropout(), torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # dropout is at work
    with rollout_mode(model):
        logits = model(ids).logits
        assert torch.equal(logits, model(ids).logits)
        assert not any(flags(model))
        assert not logits.requires_grad and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert model(ids).logits.requires_grad


def test_rollout_mode_restores_every_module() -> None:
    model = model_with_dropout()
    before = flags(model)
    assert True in before and False in before
    with rollout_mode(model):
        pass
    assert flags(model) == before


def test_rollout_mode_restores_after_an_exception() -> None:
    model = model_with_dropout()
    before = flags(model)
    with pytest.raises(RuntimeError, match="boom"), rollout_mode(model):
        raise RuntimeError("boom")
    assert flags(model) == before
    assert torch.is_grad_enabled()


def test_rollout_mode_leaves_an_evaluating_model_alone() -> None:
    model = tiny_model("llama", seed=1)
    with rollout_mode(model):
        assert not any(flags(model))
    assert not any(flags(model))


# --- probe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_accepts_the_supported_families(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, seed=1, num_layers=3, sharpness=SHARPNESS).to(dtype)
    probe(CausalLM(model), "student")
    probe(CausalLM(model, vocab_size=VOCAB_SIZE - 50), "student")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_probe_accepts_both_masked_attentions(family: str, attention: str) -> None:
    model = tiny_model(family, seed=1)
    model.set_attn_implementation(attention)
    probe(CausalLM(model), "student")


class Doubled(LlamaForCausalLM):
    """An architecture with something behind its head that nobody was told of."""

    def forward(self, *args: object, **kwargs: object) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class Shifted(LlamaForCausalLM):
    """An architecture with something before its decoder."""

    def forward(self, input_ids: Tensor, **kwargs: object) -> CausalLMOutputWithPast:
        return super().forward(input_ids=(input_ids + 1) % VOCAB_SIZE, **kwargs)


class Warmer(LlamaForCausalLM):
    """Logits a little too large: within the looser bound of a cached bf16 forward."""

    def forward(self, *args: object, **kwargs: object) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = 1.1 * output.logits
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", [Doubled, Shifted, Warmer])
def test_probe_refuses_what_it_cannot_reproduce(
    model_class: type[PreTrainedModel], dtype: torch.dtype
) -> None:
    model = model_class(tiny_model("llama", seed=1).config).eval().to(dtype)
    with pytest.raises(UnsupportedModelError, match="the teacher: the output head of"):
        probe(CausalLM(model), "the teacher")


def test_probe_refuses_positions_that_are_no_rotation() -> None:
    """Bloom's alibi takes its positions from a 2-D mask and fails on a 4-D one."""
    config = BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=VOCAB_SIZE)
    with pytest.raises(UnsupportedModelError, match="student: BloomForCausalLM cannot be run"):
        probe(CausalLM(BloomForCausalLM(config).eval()), "student")


def test_probe_refuses_not_a_number() -> None:
    model = tiny_model("llama", seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError):
        probe(CausalLM(model), "student")


@pytest.mark.parametrize("own", ["xformers", None])
def test_attention_that_no_other_equals_is_refused(own: str | None) -> None:
    model = tiny_model("llama", seed=1)
    model.config._attn_implementation = own
    with pytest.raises(UnsupportedModelError, match=f"{own!r} cannot be replaced in rollouts"):
        CausalLM(model)


def test_a_head_gives_no_more_logits_than_it_has() -> None:
    with pytest.raises(ValueError, match="cannot give"):
        Head(tiny_model("llama", seed=1), vocab_size=10_000)


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", "conv"])
def test_layers_without_a_cache_by_position_are_refused(kind: str) -> None:
    model = tiny_model("qwen2", seed=1)
    model.config.layer_types = ["full_attention", kind]
    with pytest.raises(UnsupportedModelError, match=kind):
        CausalLM(model)


def test_the_refusal_is_a_value_error() -> None:
    assert issubclass(UnsupportedModelError, ValueError)


# --- cached forward ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_of_the_sequence_gives_the_same_logits(family: str) -> None:
    """Ragged rows, wrong tokens overwritten, sequences three times the window."""
    model = tiny_model(family, seed=1, num_layers=3, sharpness=SHARPNESS)
    lm, length = CausalLM(model), 48
    ids = torch.tensor(random_prompts(7, [length, length]))
    expected = model(input_ids=ids, use_cache=False).logits
    cache, offsets = lm.new_cache(2, length), torch.tensor([[0], [5]])  # row 1 is 5 tokens ahead
    got = torch.full_like(expected, torch.nan)

    def feed(positions: Tensor, wrong: bool = False) -> None:
        tokens = ids.gather(1, positions)
        tokens = (tokens + 1) % VOCAB_SIZE if wrong else tokens
        hidden = lm.forward(tokens, positions, cache, int(positions.max()) + 1)
        got.scatter_(1, positions[..., None].expand(-1, -1, VOCAB_SIZE), lm.logits(hidden))

    feed(torch.arange(5).expand(2, -1))
    for start, stop in [(0, 8), (8, 9), (9, 20), (20, 40), (40, 43)]:
        following = torch.arange(start, min(stop + 4, 43)) + offsets
        feed(following, wrong=True)
        feed(torch.arange(start, stop) + offsets)
    # Row 0 stops 5 short of row 1. Summation order only: ~1e-6 of logits of size ~20.
    assert torch.allclose(got[0, :43], expected[0, :43], rtol=0, atol=2e-4)
    assert torch.allclose(got[1], expected[1], rtol=0, atol=2e-4)


# --- Head -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_head_slices_to_the_shared_vocabulary(family: str) -> None:
    model = tiny_model(family, seed=1, sharpness=SHARPNESS)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    whole, shared = Head(model), Head(model, vocab_size=120)
    assert (whole.vocab_size, whole.full_vocab_size) == (VOCAB_SIZE, VOCAB_SIZE)
    assert (shared.vocab_size, shared.full_vocab_size) == (120, VOCAB_SIZE)
    assert whole(hidden).shape == (2, 3, VOCAB_SIZE)
    assert torch.equal(shared(hidden), whole(hidden)[..., :120])
    ids = torch.arange(30)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    last_hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    # The same operations but for one: x * (1 / s) rounds once more than x / s, 1e-7 relative.
    assert torch.allclose(whole(last_hidden), logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_head_knows_scale_and_softcap() -> None:
    hidden = torch.ones(1, 32)
    for family, scale, softcap in [("cohere", 0.3, None), ("granite", 1 / 3, None)]:
        head = Head(tiny_model(family, seed=1))
        assert head.scale == pytest.approx(scale) and head.softcap is softcap
        assert torch.allclose(head(hidden), head.module(hidden) * scale)
    head = Head(tiny_model("gemma2", seed=1, sharpness=20.0))
    assert (head.scale, head.softcap) == (1.0, 30.0)
    assert float(head.module(hidden).abs().max()) > 30 > float(head(hidden).abs().max())


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_masks_follow_the_definition(window: int | None) -> None:
    positions = torch.tensor([[0, 1, 2], [4, 5, 6], [9, 9, 9]])
    got = visible_slots(positions, 10, window)
    assert got.shape == (3, 1, 3, 10) and got.dtype == torch.bool
    for row in range(3):
        for query in range(3):
            position = int(positions[row, query])
            first = 0 if window is None else max(0, position - window + 1)
            seen = got[row, 0, query].nonzero()[:, 0].tolist()
            assert seen == list(range(first, position + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_masks(dtype: torch.dtype) -> None:
    visible = torch.tensor([[True, False]])
    mask = additive(visible, dtype)
    assert mask.dtype == dtype
    assert mask.tolist() == [[0.0, torch.finfo(dtype).min]]


# --- SlotCache --------------------------------------------------------------------------------


def keys_of(values: list[list[float]]) -> Tensor:
    """[B, Q] -> [B, 1 head, Q, 1]"""
    return torch.tensor(values)[:, None, :, None]


def test_cache_writes_each_token_into_its_slot() -> None:
    cache = SlotCache(num_layers=2, num_rows=2, num_slots=6)
    cache.place(torch.tensor([[0, 1, 2], [3, 1, 5]]), cache.view(6))
    keys, values = cache.update(
        keys_of([[1, 2, 3], [4, 5, 6]]), -keys_of([[1, 2, 3], [4, 5, 6]]), 1
    )
    assert keys.squeeze().tolist() == [[1, 2, 3, 0, 0, 0], [0, 5, 0, 4, 0, 6]]
    assert torch.equal(values, -keys)
    cache.place(torch.tensor([[1], [3]]), cache.view(4))
    keys, _ = cache.update(keys_of([[7], [8]]), keys_of([[7], [8]]), 1)
    assert keys.squeeze().tolist() == [[1, 7, 3, 0, 0, 0], [0, 5, 0, 8, 0, 6]]
    assert not cache.layers[0].is_initialized  # layers do not share storage


def test_cache_shows_a_rounded_number_of_slots() -> None:
    cache = SlotCache(num_layers=1, num_rows=1, num_slots=3 * VIEW_MULTIPLE - 5)
    position = torch.zeros(1, 1, dtype=torch.long)
    for longest, view in [
        (1, VIEW_MULTIPLE),
        (VIEW_MULTIPLE, VIEW_MULTIPLE),
        (VIEW_MULTIPLE + 1, 2 * VIEW_MULTIPLE),
        (2 * VIEW_MULTIPLE + 1, 3 * VIEW_MULTIPLE - 5),  # never more than there are
    ]:
        assert cache.view(longest) == view
        cache.place(position, view)
        keys, values = cache.update(keys_of([[1]]), keys_of([[1]]), 0)
        assert keys.shape[2] == values.shape[2] == view
        assert cache.get_mask_sizes(1, 0) == (view, 0)


def test_cache_keeps_the_rows_it_is_told_to() -> None:
    cache = SlotCache(num_layers=2, num_rows=4, num_slots=2)
    cache.keep_rows(torch.tensor([0, 1, 3]))  # before anything was written: nothing to do but count
    cache.place(torch.tensor([[0], [1], [0]]), view=2)
    for layer in range(2):
        cache.update(keys_of([[1], [2], [3]]), keys_of([[1], [2], [3]]), layer)
    cache.keep_rows(torch.tensor([1, 2]))
    cache.place(torch.tensor([[0], [1]]), view=2)
    for layer in range(2):
        keys, values = cache.update(keys_of([[8], [9]]), keys_of([[8], [9]]), layer)
        assert keys.squeeze().tolist() == values.squeeze().tolist() == [[8, 2], [3, 9]]
