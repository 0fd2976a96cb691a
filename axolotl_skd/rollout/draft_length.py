"""How many tokens to draft per verification: a fixed number, or the one that is fastest right now.

A round of G drafts costs G student steps and one teacher verification of G tokens and commits, at
acceptance rate a, E = 1 + a + ... + a^(G-1) tokens per row (Leviathan et al. 2023, without a bonus
token). The adaptive policy minimises seconds per committed token with what it has measured itself.
Keyed sampling makes the choice free: no draft length can change a token.

Legend: R rows in flight, G draft tokens.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

MAX_DRAFT_TOKENS = 16

# What is tried at first, and again whenever the teacher's cost is known at one size alone.
_TRIALS = (4, 2, 6)
# Verified tokens after which an old acceptance counts half, and the weight of the guess at the start.
_HALF_LIFE = 2000.0
_PRIOR_ACCEPTED, _PRIOR_VERIFIED = 14.0, 20.0
# Measurements that are remembered: what was slow once, as a first forward is, does not count for ever.
_MEMORY = 128


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What a round was like.

    Attributes:
        num_rows: R.
        num_draft_tokens: G.
        student_seconds: for the G steps.
        teacher_seconds: for everything else, verification above all.
        num_verified: proposals of all rows that were judged and count.
        num_accepted: those of them that were kept.
    """

    num_rows: int
    num_draft_tokens: int
    student_seconds: float
    teacher_seconds: float
    num_verified: int
    num_accepted: int


class DraftLength(Protocol):
    def choose(self, num_rows: int, longest_remaining: int) -> int:
        """G of the next round, at most the tokens that the row with most to come still needs."""

    def observe(self, report: RoundReport) -> None:
        """Learn from a round that is over."""


@dataclass(frozen=True, slots=True)
class FixedDraftLength:
    num_draft_tokens: int

    def choose(self, num_rows: int, longest_remaining: int) -> int:
        return min(self.num_draft_tokens, longest_remaining)

    def observe(self, report: RoundReport) -> None:
        """Nothing to learn."""


def expected_tokens(acceptance_rate: float, num_draft_tokens: int) -> float:
    """E, the tokens that a row commits per round."""
    return sum(acceptance_rate**i for i in range(num_draft_tokens))


@dataclass(slots=True)
class MeasuredCost:
    """Seconds of a forward by the number of tokens fed: straight lines through medians per size.

    Not one line: a product with few rows costs more per row than a large one, and a GPU's cost is flat
    first and steep later. A size counts by how near it is to the one asked for.
    """

    _samples: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_MEMORY))

    @property
    def num_sizes(self) -> int:
        return len({size for size, _ in self._samples})

    def add(self, num_tokens: int, seconds: float) -> None:
        self._samples.append((num_tokens, seconds))

    def medians(self) -> dict[int, float]:
        """Median seconds by size."""
        by_size: dict[int, list[float]] = {}
        for size, seconds in self._samples:
            by_size.setdefault(size, []).append(seconds)
        return {size: statistics.median(durations) for size, durations in by_size.items()}


def local_line(medians: Mapping[int, float], near: int) -> tuple[float, float]:
    """(seconds at no tokens, seconds per token): least squares, neither of them negative.

    Args:
        medians: seconds by size.
        near: a size s counts with weight (min(s, near) / max(s, near))^2.
    """
    weights = [(min(size, near) / max(size, near)) ** 2 for size in medians]

    def mean(values: Iterable[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    mean_size, mean_seconds = mean(medians), mean(medians.values())
    spread = mean((size - mean_size) ** 2 for size in medians)
    slope = 0.0
    if spread:
        products = ((s - mean_size) * (t - mean_seconds) for s, t in medians.items())
        slope = mean(products) / spread
    # More tokens are never cheaper, and no tokens never cost less than nothing.
    slope = min(max(slope, 0.0), mean_seconds / mean_size)
    return mean_seconds - slope * mean_size, slope


def _seconds(medians: Mapping[int, float], num_tokens: int) -> float:
    constant, slope = local_line(medians, num_tokens)
    return constant + slope * num_tokens


class AdaptiveDraftLength:
    """argmin over G of (G c_student(R) + c_teacher(R G)) / E(a, G), all three measured."""

    def __init__(self, max_draft_tokens: int = MAX_DRAFT_TOKENS) -> None:
        self._max = max_draft_tokens
        self._student, self._teacher = MeasuredCost(), MeasuredCost()
        self._accepted, self._verified = _PRIOR_ACCEPTED, _PRIOR_VERIFIED
        self._rounds = 0

    @property
    def acceptance_rate(self) -> float:
        """Running estimate of a."""
        return self._accepted / self._verified

    def choose(self, num_rows: int, longest_remaining: int) -> int:
        most = min(self._max, longest_remaining)
        if self._rounds < len(_TRIALS) or self._teacher.num_sizes == 1:
            return min(_TRIALS[self._rounds % len(_TRIALS)], most)
        student, teacher = self._student.medians(), self._teacher.medians()
        step = _seconds(student, num_rows)

        def seconds_per_token(num_draft: int) -> float:
            verification = _seconds(teacher, num_rows * num_draft)
            expected = expected_tokens(self.acceptance_rate, num_draft)
            return (num_draft * step + verification) / expected

        return min(range(1, most + 1), key=seconds_per_token)

    def observe(self, report: RoundReport) -> None:
        self._rounds += 1
        num_draft = report.num_draft_tokens
        self._student.add(report.num_rows, report.student_seconds / num_draft)
        self._teacher.add(report.num_rows * num_draft, report.teacher_seconds)
        kept = 0.5 ** (report.num_verified / _HALF_LIFE)
        self._accepted = kept * self._accepted + report.num_accepted
        self._verified = kept * self._verified + report.num_verified
