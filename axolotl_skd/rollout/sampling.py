"""Keyed random numbers, nucleus sampling and the top-K acceptance test: pure functions.

Every random number is a hash of (seed, epoch, sample, rollout index, position, role). A token then
depends on the committed prefix and its key alone: the draft length, the other rows of the batch, the
cache and the number of ranks cannot change it.

Legend: B rows, N any number of positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014): increment and multipliers, as signed 64-bit integers.
_INCREMENT = -0x61C8864680B583EB
_MULTIPLIER_1 = -0x40A7B892E31B1A47
_MULTIPLIER_2 = -0x6B2FB644ECCEEE15

# A nucleus of this many tokens is found without sorting the vocabulary.
SHORTLIST = 128

# A `top_p` whose nucleus is the most likely token alone.
GREEDY = torch.finfo(torch.float64).tiny

# Relative error allowed to a sum of float32 weights over the vocabulary.
_TOTAL_TOLERANCE = 1e-5

# exp of this is nothing beside 1, and still a normal number: a CPU is slow with denormal ones.
_NEGLIGIBLE = -80.0


class NonFiniteLogitsError(RuntimeError):
    """Logits from which nothing can be sampled, and whose they are."""

    _REMEDIES = {
        "student": "If training had begun, it diverged: lower learning_rate. Else base_model or its "
        "dtype is broken.",
        "teacher": "Its checkpoint or its dtype is broken (distillation.teacher.dtype: bfloat16 or "
        "float32 instead of float16 is the usual remedy).",
    }

    def __init__(
        self,
        rows: Sequence[int],
        model: str | None = None,
        names: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        """
        Args:
            rows: their indices.
            model: "student" or "teacher"; None if it is not known here.
            names: what a caller knows the rows by.
            hint: what else can be done.
        """
        whose = f"sample(s) {', '.join(names)}" if names else f"rows {', '.join(map(str, rows))}"
        of_model = f"{model}'s " if model else ""
        super().__init__(
            f"the {of_model}logits of {whose} are not finite (NaN or "
            f"infinite), so no token can be sampled. {self._REMEDIES.get(model, '')}{hint}"
        )
        self.rows = list(rows)
        self.model = model


class Role(IntEnum):
    """What a random number is for. The values are part of the stream: never renumber."""

    STUDENT = 0
    TEACHER = 1
    ACCEPT = 2  # of acceptance rules that draw one
    GATE = 3  # of gates on tokens' losses
    SOURCE = 4  # whether a sequence is rolled out at all


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def _fold(state: Tensor, value: Tensor | int) -> Tensor:
    """Absorb one more component of the key; integer overflow wraps by design."""
    return _mix(
        (state ^ _mix(torch.as_tensor(value, device=state.device) + _INCREMENT)) + _INCREMENT
    )


def row_streams(
    seed: int, epoch: int, sample_ids: Tensor, rollout_index: int | Tensor = 0
) -> Tensor:
    """One random stream per row.

    Args:
        seed: the run's seed.
        epoch: index of the epoch; a sample is rolled out anew in each.
        sample_ids: int64 [B], what identifies the row of the data set.
        rollout_index: which of several rollouts of the same prompt; one for all, or int64 [B].

    Returns:
        int64 [B]
    """
    state = torch.zeros_like(sample_ids)
    for component in (seed, epoch, sample_ids, rollout_index):
        state = _fold(state, component)
    return state


def keyed_uniform(streams: Tensor, positions: Tensor, role: Role | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of their key.

    Args:
        streams: int64, from `row_streams`.
        positions: int64, broadcastable to `streams`: absolute position of the token to be sampled.
        role: what the number is for; or several, int64, broadcastable to both.

    Returns:
        float64, of the broadcast shape, multiples of 2^-53.
    """
    streams, positions = torch.broadcast_tensors(streams, positions)
    bits = _fold(_fold(streams, positions), role)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def sample_top_p(
    logits: Tensor, temperature: float, top_p: float, uniforms: Tensor, shortlist: int = SHORTLIST
) -> Tensor:
    """Inverse-CDF sampling from the tempered nucleus.

    The order is (probability descending, id ascending) for every `top_p`, the nucleus is the smallest
    prefix of it with mass >= `top_p` (the crossing token included), sums are in float64. Only a
    shortlist of the vocabulary is sorted; it widens until it provably holds the sampled token, which
    waits for the device once per width (`sample_from_shortlist` never does).

    Args:
        logits: [N, V], any float dtype.
        temperature: > 0, divides the logits.
        top_p: in (0, 1].
        uniforms: float64 [N] in [0, 1).
        shortlist: tokens looked at first.

    Returns:
        int64 [N]

    Raises:
        NonFiniteLogitsError: a row holds NaN or +inf, or -inf alone.
    """
    vocab_size, width = logits.shape[-1], shortlist
    while width < vocab_size:
        tokens, settled = sample_from_shortlist(logits, temperature, top_p, uniforms, width)
        if bool(settled.all()):
            return tokens
        width *= 8
    tokens, finite = sample_from_shortlist(logits, temperature, top_p, uniforms, vocab_size)
    if not bool(finite.all()):
        raise NonFiniteLogitsError((~finite).nonzero()[:, 0].tolist())
    return tokens


def sample_from_shortlist(
    logits: Tensor, temperature: float, top_p: float, uniforms: Tensor, width: int = SHORTLIST
) -> tuple[Tensor, Tensor]:
    """`sample_top_p` from the `width` most likely tokens, without a word from the device.

    Returns:
        tokens int64 [N]; bool [N], True where the shortlist proved long enough and the token is the
        one of the whole vocabulary. Never True for logits from which nothing can be sampled.
    """
    width = min(width, logits.shape[-1])
    exact = width == logits.shape[-1]
    top = logits.amax(dim=-1, keepdim=True)
    total = _total_weight(logits, top, temperature, exact)
    values, ids = _descending(logits, width)
    cumulative = ((values.double() - top.double()) / temperature).exp().cumsum(dim=-1) / total
    if exact:
        settled = total.isfinite().squeeze(-1)
    else:
        # Tokens tied with the last one may have been left out, so only what is strictly above it is
        # known to be in its final place. Nor may the error of the total decide anything.
        threshold = uniforms[:, None] if top_p == 1 else torch.full_like(total, top_p)
        mass = torch.where(values > values[:, -1:], cumulative, 0.0).amax(dim=-1, keepdim=True)
        clear = (cumulative - threshold).abs() > _TOTAL_TOLERANCE * threshold
        settled = ((mass > threshold) & clear).all(dim=-1)
    before = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], dim=-1)
    inside = (before < top_p) & (values > -torch.inf)
    last = (inside.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # index of the crossing token
    nucleus = cumulative.gather(-1, last) if top_p < 1 else torch.ones_like(total)
    index = (cumulative <= uniforms[:, None] * nucleus).sum(dim=-1, keepdim=True)
    return ids.gather(-1, torch.minimum(index, last)).squeeze(-1), settled


def warped_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution that `sample_top_p` samples from, over the whole vocabulary.

    Args:
        logits: [N, V].
        temperature, top_p: as there.

    Returns:
        float64 [N, V], zero outside the nucleus, each row of sum 1.
    """
    probs = (logits.double() / temperature).softmax(dim=-1)
    if top_p == 1:
        return probs
    order = _descending(logits, logits.shape[-1])[1]
    ordered = probs.gather(-1, order)
    before = torch.nn.functional.pad(ordered.cumsum(dim=-1)[:, :-1], (1, 0))
    inside = before < top_p
    kept = torch.zeros_like(probs).scatter_(-1, order, ordered * inside)
    return kept / kept.sum(dim=-1, keepdim=True)


def _total_weight(logits: Tensor, top: Tensor, temperature: float, exact: bool) -> Tensor:
    """sum_v exp((logit_v - top) / temperature): float64 [N, 1].

    Unless `exact`, the terms are float32, which is much faster: their arguments are rounded by 2^-24 of
    up to ln V in the terms that matter, far inside `_TOTAL_TOLERANCE`.
    """
    precise = exact or logits.dtype == torch.float64
    weights = ((logits.double() if precise else logits.float()) - top).div_(temperature)
    if not precise:
        weights.clamp_(min=_NEGLIGIBLE)
    return weights.exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)


def _descending(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest per row, value descending, ties by ascending id: ([N, width], int64 ids)."""
    if width == logits.shape[-1]:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    ids = logits.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = torch.sort(logits.gather(-1, ids), dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def top_k_accept_mask(logits: Tensor, token_ids: Tensor, top_k: int) -> Tensor:
    """SKD's acceptance test: is the token among the `top_k` of the raw logits?

    A token passes iff fewer than `top_k` logits are strictly greater than its own, so tokens tied at
    rank K all pass.

    Args:
        logits: [..., V], neither tempered nor filtered.
        token_ids: int64 [...].
        top_k: K >= 1.

    Returns:
        bool [...]
    """
    own = logits.gather(-1, token_ids.unsqueeze(-1))
    return (logits > own).sum(dim=-1, dtype=torch.int32) < top_k
