"""The oracle: SKD's Algorithm 1 written from its definition, as slowly and plainly as possible.

One row, one position at a time; no cache, no batch, no rounds: every token asks the whole model
anew for `model(prefix).logits`. Sampling is a full sort in Python floats, the acceptance test a
full sort of the raw logits, the random numbers are Python integers modulo 2^64. Nothing is imported
from the package under test and no shortcut of the engine is repeated: agreement is evidence.

That one position at a time equals rounds of G proposals is the claim of the convention (a token
depends on the committed prefix and its key alone), so `interleave` has no draft length;
`count_rounds` replays the rounds of a finished row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

STUDENT, TEACHER, ACCEPT = 0, 1, 2  # roles of a random number
STOP, LENGTH = "STOP", "LENGTH"

NextLogits = Callable[[list[int]], list[float]]
Verdict = Callable[[list[float], list[float], int, float], bool]
"""(student's logits, teacher's logits, proposal, u) -> is it kept?"""

_WORD = 2**64


@dataclass(frozen=True)
class Sampler:
    """temperature > 0 divides the logits, top_p in (0, 1] is the mass of the nucleus."""

    temperature: float
    top_p: float


@dataclass(frozen=True)
class Key:
    """What names a row's random numbers."""

    seed: int
    epoch: int
    sample_id: int
    rollout_index: int = 0


@dataclass
class OracleRow:
    """What the oracle says about one row."""

    completion: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    finish: str = LENGTH


# --- random numbers ---------------------------------------------------------------------------


def finalise(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), on an unsigned 64-bit word."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _WORD
    return z ^ (z >> 31)


def splitmix(z: int) -> int:
    """One step of splitmix64: add the golden increment, finalise."""
    return finalise((z + 0x9E3779B97F4A7C15) % _WORD)


def absorb(words: Sequence[int]) -> int:
    """Hash of a sequence of integers of any sign: state <- splitmix(state ^ splitmix(word))."""
    state = 0
    for word in words:
        state = splitmix(state ^ splitmix(word % _WORD))
    return state


def uniform(key: Key, position: int, role: int) -> float:
    """The upper 53 bits of the hash of the whole key, as a number in [0, 1)."""
    words = (key.seed, key.epoch, key.sample_id, key.rollout_index, position, role)
    return (absorb(words) >> 11) / 2**53


# --- distributions ----------------------------------------------------------------------------


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def nucleus(logits: Sequence[float], sampler: Sampler) -> tuple[list[int], list[float]]:
    """The tokens that may be sampled, in order, and the running sums of their probabilities."""
    probs = softmax([value / sampler.temperature for value in logits])
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    order = [token for token in order if probs[token] > 0]
    sums = list(accumulate(probs[token] for token in order))
    if sampler.top_p < 1:
        size = next((i + 1 for i, mass in enumerate(sums) if mass >= sampler.top_p), len(sums))
        order, sums = order[:size], sums[:size]
    return order, sums


def draw(logits: Sequence[float], sampler: Sampler, u: float) -> int:
    """Inverse CDF: the first token at which the renormalised running sum exceeds u."""
    order, sums = nucleus(logits, sampler)
    return next((t for t, mass in zip(order, sums, strict=True) if mass / sums[-1] > u), order[-1])


def in_top_k(logits: Sequence[float], token: int, top_k: int) -> bool:
    """Is the token at least as large as the K-th largest logit?"""
    ranked = sorted(logits, reverse=True)
    return logits[token] >= ranked[min(top_k, len(ranked)) - 1]


def in_top_p(logits: Sequence[float], token: int, top_p: float) -> bool:
    """Is the token one of the nucleus at temperature 1?"""
    return token in nucleus(logits, Sampler(1.0, top_p))[0]


def in_min_p(logits: Sequence[float], token: int, min_p: float) -> bool:
    """Has the token min_p times the largest probability at temperature 1?"""
    probs = softmax(logits)
    return probs[token] >= min_p * max(probs)


def warped(logits: Sequence[float], sampler: Sampler) -> dict[int, float]:
    """Token -> probability with which it is sampled; tokens outside the nucleus are missing."""
    order, sums = nucleus(logits, sampler)
    return {
        token: (mass - before) / sums[-1]
        for token, mass, before in zip(order, sums, [0.0, *sums], strict=False)
    }


def passes_ratio_test(
    student: dict[int, float], teacher: dict[int, float], token: int, u: float
) -> bool:
    """With probability min(1, p / q)."""
    return u < min(1.0, teacher.get(token, 0.0) / student[token])


def draw_residual(student: dict[int, float], teacher: dict[int, float], u: float) -> int:
    """Inverse CDF of max(p - q, 0), the most likely first."""
    rest = {t: p - student.get(t, 0.0) for t, p in teacher.items() if p > student.get(t, 0.0)}
    order = sorted(rest, key=lambda token: (-rest[token], token))
    sums = list(accumulate(rest[token] for token in order))
    return next((t for t, mass in zip(order, sums, strict=True) if mass > u * sums[-1]), order[-1])


# --- rollouts ---------------------------------------------------------------------------------


def uncached(model: torch.nn.Module) -> NextLogits:
    """Next-token logits of a Hugging Face model, the whole prefix read anew."""

    @torch.no_grad()
    def next_logits(prefix: list[int]) -> list[float]:
        ids = torch.tensor([prefix])
        return model(input_ids=ids, use_cache=False).logits[0, -1].double().tolist()

    return next_logits


def interleave(
    student: NextLogits,
    teacher: NextLogits,
    prompt: Sequence[int],
    key: Key,
    max_new: int,
    student_sampler: Sampler,
    teacher_sampler: Sampler,
    top_k: int,
    stop_ids: Sequence[int],
    *,
    verdict: Verdict | None = None,
    residual: bool = False,
    argmax: bool = False,
    bonus_after: int | None = None,
    ends: Callable[[list[int]], bool] = lambda completion: False,
) -> OracleRow:
    """Algorithm 1: the student proposes, the teacher keeps or replaces.

    Args:
        verdict: another rule than the top-K test.
        residual: replace from max(p - q, 0), not from p.
        argmax: replace by the teacher's most likely token.
        bonus_after: kept proposals in a row after which the teacher adds a token.
        ends: does the row end with this completion, beside the stop tokens?
    """
    row, prefix, kept = OracleRow(), list(prompt), 0
    while len(row.completion) < max_new:
        position = len(prefix)
        judged = teacher(prefix)
        if argmax:
            own = judged.index(max(judged))
        else:
            own = draw(judged, teacher_sampler, uniform(key, position, TEACHER))
        if kept == bonus_after:
            token, accepted, proposal, kept = own, False, -1, 0
        else:
            wanted = student(prefix)
            proposal = draw(wanted, student_sampler, uniform(key, position, STUDENT))
            if verdict is None:
                accepted = in_top_k(judged, proposal, top_k)
            else:
                accepted = verdict(wanted, judged, proposal, uniform(key, position, ACCEPT))
            if residual and not accepted:
                own = draw_residual(
                    warped(wanted, student_sampler),
                    warped(judged, teacher_sampler),
                    uniform(key, position, TEACHER),
                )
            token = proposal if accepted else own
            kept = kept + 1 if accepted else 0
        prefix.append(token)
        row.completion.append(token)
        row.accepted.append(accepted)
        row.proposed.append(proposal)
        if token in stop_ids or ends(row.completion):
            row.finish = STOP
            break
    return row


def sample(
    model: NextLogits,
    role: int,
    prompt: Sequence[int],
    key: Key,
    max_new: int,
    sampler: Sampler,
    stop_ids: Sequence[int],
) -> OracleRow:
    """Plain sampling from one model."""
    row, prefix = OracleRow(), list(prompt)
    while len(row.completion) < max_new:
        token = draw(model(prefix), sampler, uniform(key, len(prefix), role))
        prefix.append(token)
        row.completion.append(token)
        row.accepted.append(role == STUDENT)
        row.proposed.append(token if role == STUDENT else -1)
        if token in stop_ids:
            row.finish = STOP
            break
    return row


def count_rounds(
    rows: Sequence[OracleRow], max_new: Sequence[int], num_draft_tokens: int
) -> tuple[list[int], int]:
    """Replay the rounds of a batch: proposals paid for per row, rounds of the batch.

    A round proposes G tokens to every row that has not ended, fewer where no row has G to go; a row
    then advances past its first rejection or by all proposals.
    """
    done, paid, rounds = [0] * len(rows), [0] * len(rows), 0
    while True:
        live = [i for i, row in enumerate(rows) if done[i] < len(row.completion)]
        if not live:
            return paid, rounds
        size = min(num_draft_tokens, max(max_new[i] - done[i] for i in live))
        for i in live:
            paid[i] += size
            verdicts = rows[i].accepted[done[i] : done[i] + size]
            done[i] += verdicts.index(False) + 1 if False in verdicts else len(verdicts)
        rounds += 1
