"""A uniform view of a Hugging Face causal LM: decoder, head, cached forward, rollout mode.

Legend: B rows, Q tokens fed per row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from axolotl_skd.rollout.attention import (
    additive,
    attention_of,
    is_softcapped,
    rollout_attention,
    visible_slots,
)
from axolotl_skd.rollout.cache import VIEW_MULTIPLE, SlotCache
from axolotl_skd.rollout.graphs import Capture, GraphedForwards

LOG = logging.getLogger(__name__)

# With graphs, fewer and larger views: each is a shape of its own.
_GRAPHED_VIEW_MULTIPLE = 256

# Positions, padding included, of one forward without gradient over rows that are there already.
GIVEN_TOKENS = 2**14

# Transformers' names of layers in which each token has keys and values of its own.
_ADDRESSED_LAYERS = {"full_attention", "sliding_attention"}


class UnsupportedModelError(ValueError):
    """A model whose forward this package cannot reproduce exactly."""


class HeadMismatchError(UnsupportedModelError):
    """The output head does not give the model's own logits."""


class LanguageModel(Protocol):
    """What the engine needs of a model; tests put hand-written stubs in its place."""

    device: torch.device
    vocab_size: int

    def new_cache(self, num_rows: int, num_slots: int) -> Any:
        """An empty cache with `keep_rows(index)`."""

    def prefill(self, ids: Tensor, rows: Tensor, cache: Any) -> None:
        """Put tokens int64 [r, W] at positions 0 .. W - 1 of the cache's rows int64 [r]."""

    def forward(self, ids: Tensor, positions: Tensor, cache: Any, longest: int) -> Tensor:
        """ids, positions int64 [B, Q]; `longest` >= positions.max() + 1 -> hidden [B, Q, H]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> raw logits [..., V] of the vocabulary that both models share."""


class Head:
    """From the last hidden state to raw logits: `lm_head` and what the architecture does behind it.

    Equivalent to `cap(scale * (hidden @ weight.T + bias))[..., :vocab_size]`; scale is Cohere's
    `logit_scale` or the inverse of Granite's `logits_scaling`, cap is Gemma's tanh softcap.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        """
        Args:
            model: the causal LM.
            vocab_size: keep the first `vocab_size` logits (the vocabulary both models share).
        """
        config = model.config.get_text_config()
        self.module: nn.Module = model.get_output_embeddings()
        self.full_vocab_size: int = self.module.weight.shape[0]
        self.vocab_size = vocab_size or self.full_vocab_size
        if self.vocab_size > self.full_vocab_size:
            raise ValueError(
                f"a head of {self.full_vocab_size} rows cannot give {self.vocab_size} logits"
            )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]"""
        # Not `self.module(hidden)`: an engine's hooks on it would gather and free its weights, together
        # with other ranks, which may call it less often.
        logits = self.module.forward(hidden)[..., : self.vocab_size]
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class CausalLM:
    """A `LanguageModel` on a stock, unpatched Hugging Face causal LM (or a PEFT model's base)."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        new_capture: Callable[[], Capture] | None = None,
    ) -> None:
        """
        Args:
            model: a causal LM with a position-addressed KV cache.
            vocab_size: size of the shared vocabulary, default the model's own.
            precision: the autocast context in which this model computes, whatever is around it.
            new_capture: how repeated forwards of a rollout become graphs, None: not at all.
        """
        self.precision = precision
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.head = Head(model, vocab_size)
        self._new_capture = new_capture
        self._attention = _require_rollout_attention(self.config)
        layer_types = getattr(self.config, "layer_types", None)
        self._layer_types: frozenset[str] | None = layer_types and frozenset(layer_types)
        self._window: int | None = getattr(self.config, "sliding_window", None)
        require_cache_by_position(type(model).__name__, model.config)

    @property
    def device(self) -> torch.device:
        return self.head.module.weight.device

    @property
    def vocab_size(self) -> int:
        """V, of the logits."""
        return self.head.vocab_size

    @property
    def head_module(self) -> nn.Module:
        """Whose parameters `logits` applies."""
        return self.head.module

    @property
    def state_size(self) -> int:
        """H, numbers of a state from which `logits` are computed."""
        return self.config.hidden_size

    def new_cache(self, num_rows: int, num_slots: int) -> SlotCache:
        num_layers = self.config.num_hidden_layers
        if self._new_capture is None:
            return SlotCache(num_layers, num_rows, num_slots, VIEW_MULTIPLE)
        graphed = GraphedForwards(self._new_capture, self._give_up_graphs)
        return SlotCache(num_layers, num_rows, num_slots, _GRAPHED_VIEW_MULTIPLE, graphed)

    @property
    def graphs(self) -> bool:
        """Are repeated forwards of a rollout captured?"""
        return self._new_capture is not None

    def _give_up_graphs(self) -> None:
        """What could not be captured once is not tried with every new cache."""
        self._new_capture = None

    def prefill(self, ids: Tensor, rows: Tensor, cache: SlotCache) -> None:
        # Right-padded: pads sit in later slots, invisible until overwritten by the real token. So
        # the stock causal mask is the right one, with its fast kernels.
        cache.place_prompts(rows, ids.shape[1])
        with self.precision(), attention_of(self.config, self._attention):
            self._read(
                input_ids=ids,
                position_ids=cache.placement.slots,
                past_key_values=cache,
                use_cache=True,
            )

    def forward(self, ids: Tensor, positions: Tensor, cache: SlotCache, longest: int) -> Tensor:
        view = cache.view(longest)

        def decode(ids: Tensor, positions: Tensor) -> Tensor:
            cache.place(positions, view)
            with self.precision(), attention_of(self.config, self._attention):
                return self._states(
                    input_ids=ids,
                    attention_mask=self._attention_mask(positions, view),
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )

        if cache.graphed is None:
            return decode(ids, positions)
        return cache.graphed((view, *ids.shape), decode, ids, positions)

    def hidden_states(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states of whole rows without a cache: int64 [B, L] each -> [B, L, H]."""
        with self.precision():
            return self._states(input_ids=ids, attention_mask=attention_mask, use_cache=False)

    def wrapped_states(self, wrapper: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`hidden_states` with gradient, through whatever wraps the model in training.

        Only the wrapper's forward runs DDP's and the autocast's hooks, hence no direct call of the
        decoder; logits are asked for at one position only.

        Args:
            wrapper: the model as the trainer calls it.
            ids, attention_mask: int64 [B, L].
        """
        captured: list[Tensor] = []
        hook = self.decoder.register_forward_hook(
            lambda _module, _args, output: captured.append(output.last_hidden_state)
        )
        try:
            wrapper(input_ids=ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        return captured[0]

    def _states(self, **inputs: Any) -> Tensor:
        return self.decoder(**inputs).last_hidden_state

    def _read(self, **inputs: Any) -> None:
        """Fill the cache; nobody asks for what is said of a prompt."""
        self.decoder(**inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        with self.precision():
            return self.head(hidden)

    def _attention_mask(self, positions: Tensor, view: int) -> Tensor | dict[str, Tensor]:
        def mask(window: int | None) -> Tensor:
            visible = visible_slots(positions, view, window)
            return additive(visible, self.model.dtype) if self._attention == "eager" else visible

        if self._layer_types is None:
            return mask(self._window)
        windows = {"full_attention": None, "sliding_attention": self._window}
        return {kind: mask(windows[kind]) for kind in self._layer_types}


class FullLogitsLM(CausalLM):
    """The same for a model whose head cannot be applied apart from it: its "hidden states" are logits.

    As exact, but with V numbers a position where others have H.
    """

    @property
    def head_module(self) -> nn.Module:
        return nn.Identity()

    @property
    def state_size(self) -> int:
        return self.head.full_vocab_size

    def wrapped_states(self, wrapper: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return wrapper(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden[..., : self.head.vocab_size]

    def _states(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).logits

    def _read(self, **inputs: Any) -> None:
        self.model(**inputs, logits_to_keep=1)


def probed_lm(model: PreTrainedModel, name: str, **options: Any) -> CausalLM:
    """A view of a model that was tried out: through its head, or through its full logits.

    Args:
        model: in evaluation mode.
        name: how to call it in messages.
        options: of `CausalLM`.

    Raises:
        UnsupportedModelError: neither reproduces the model's own forward.
    """
    lm = CausalLM(model, **options)
    try:
        probe(lm, name)
    except HeadMismatchError as error:
        LOG.warning("%s Falling back to full logits, which need more memory and time.", error)
        lm = FullLogitsLM(model, **options)
        probe(lm, name)
    return lm


def require_cache_by_position(name: str, config: PreTrainedConfig) -> None:
    """Refuse state-space and hybrid models, of which the configuration alone tells.

    Their state after n tokens cannot be taken back to n - 1, as a rejected proposal demands.

    Args:
        name: how to call the model in the error.
        config: of a causal LM.

    Raises:
        UnsupportedModelError
    """
    text = config.get_text_config()
    unknown = set(getattr(text, "layer_types", None) or ()) - _ADDRESSED_LAYERS
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if unknown:
        what = f"layers of type {sorted(unknown)}"
    elif getattr(architecture, "_is_stateful", False):
        what = "a recurrent state"
    else:
        return
    raise UnsupportedModelError(
        f"{name}: an architecture of type {text.model_type!r} with {what}. A rollout needs a position-"
        "addressed KV cache in every layer (full_attention or sliding_attention). Use an "
        "attention-only model as base_model / distillation.teacher.base_model."
    )


def _require_rollout_attention(config: PreTrainedConfig) -> str:
    own, softcapped = config._attn_implementation, is_softcapped(config)
    implementation = rollout_attention(own, softcapped)
    if implementation is None and softcapped and own == "sdpa":
        raise UnsupportedModelError(
            f"attn_implementation 'sdpa' leaves out the softcap of a {config.model_type!r} model's "
            "attention scores. Set attn_implementation: eager (flash_attention_2, flex_attention) for "
            "the student, distillation.teacher.attn_implementation for the teacher."
        )
    if implementation is None:
        raise UnsupportedModelError(
            f"attn_implementation {own!r} cannot be replaced in rollouts, "
            "which need a 4-D mask. Use sdpa, eager, flex_attention or a flash_attention: "
            "attn_implementation: sdpa for the student, distillation.teacher.attn_implementation: "
            "sdpa for the teacher."
        )
    return implementation


@contextmanager
def rollout_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; every module's own training flag is restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def probe(lm: CausalLM, name: str, num_tokens: int = 12) -> None:
    """Check on a few tokens that decoder, head and cache together equal the model's own forward.

    Args:
        lm: the model in evaluation mode.
        name: how to call it in the error.
        num_tokens: tokens to try.

    Raises:
        HeadMismatchError: the head alone does not give the model's logits.
        UnsupportedModelError: the cache changes them, or the model cannot be run so.
    """
    ids = (torch.arange(2 * num_tokens, device=lm.device) % lm.head.vocab_size).view(2, -1)
    with lm.precision():
        expected = lm.model(input_ids=ids, use_cache=False).logits[..., : lm.head.vocab_size]
    if not expected.isfinite().all():
        raise UnsupportedModelError(
            f"{name}: {type(lm.model).__name__} gives NaN or infinite logits at the first tokens it is "
            "tried with: its weights are broken, or its dtype is too narrow for them (float16). Give "
            "another checkpoint or dtype."
        )
    try:
        plain = lm.logits(lm.hidden_states(ids))
        cached = lm.logits(_cached_hidden(lm, ids))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name}: {type(lm.model).__name__} cannot be run through its decoder with a position-"
            f"addressed KV cache ({type(error).__name__}: {error}). Choose an attention-only "
            "architecture with rotary or absolute positions."
        ) from error
    rounding = _rounding(lm, expected)
    # The same operations on the same shapes against other shapes, which may round differently.
    error = _relative_error(plain, expected)
    if not error <= 4 * rounding:
        raise HeadMismatchError(
            f"{name}: the output head of {type(lm.model).__name__} does not give the logits of its own "
            f"forward (relative difference {error:.1e}, allowed {4 * rounding:.1e})."
        )
    error, allowed = _relative_error(cached, expected), (16 if rounding > 1e-4 else 50) * rounding
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{name}: {type(lm.model).__name__} with a KV cache does not give the logits of its own "
            f"forward (relative difference {error:.1e}, allowed {allowed:.1e}). The architecture does "
            "something that this package does not know; choose another base_model / "
            "distillation.teacher.base_model."
        )


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of logits [B, Q, V] from the last Q expected, over the largest of them."""
    difference = (logits - expected[:, -logits.shape[1] :]).abs().max()
    return float(difference / expected.abs().max().clamp(min=1.0))


def _cached_hidden(lm: CausalLM, ids: Tensor) -> Tensor:
    """Hidden states of `ids` [B, Q] behind a prompt, fed in two pieces after a rejected proposal."""
    num_tokens = ids.shape[1]
    positions = torch.arange(num_tokens, device=ids.device).expand(len(ids), -1)
    cache = lm.new_cache(len(ids), num_tokens)
    cut = num_tokens // 3

    def feed(start: int, stop: int, tokens: Tensor = ids) -> Tensor:
        part = slice(start, stop)
        return lm.forward(tokens[:, part], positions[:, part], cache, stop)

    lm.prefill(ids[:, :cut], torch.arange(len(ids), device=ids.device), cache)
    feed(cut, cut + 3, ids.flip(1))  # rejected, overwritten below
    return torch.cat([feed(cut, cut + 1), feed(cut + 1, num_tokens)], dim=1)


def _rounding(lm: CausalLM, logits: Tensor) -> float:
    """Relative rounding of the coarsest arithmetic on the way to these logits."""
    dtypes = {logits.dtype} | {p.dtype for p in lm.model.parameters() if p.is_floating_point()}
    quantization = getattr(lm.model.config, "quantization_config", None)
    compute = getattr(quantization, "bnb_4bit_compute_dtype", None)
    if compute is not None:
        dtypes.add(compute)
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    if (logits.is_cuda and _tf32_is_on()) or getattr(lm.model, "is_loaded_in_8bit", False):
        # TF32 keeps 10 bits of the mantissa; LLM.int8 takes its outlier columns from the batch.
        rounding = max(rounding, 2.0**-10)
    return rounding


def _tf32_is_on() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch's newer settings, which this one refuses to read
        return True
