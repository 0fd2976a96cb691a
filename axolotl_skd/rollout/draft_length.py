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
from dataclasses import dataclass, field
from typing import Protocol

MAX_DRAFT_TOKENS = 16

# What is tried until both costs have been seen at different sizes.
_TRIALS = (4, 2, 6)
# Verified tokens after which an old acceptance counts half, and the weight of the guess at the start.
_HALF_LIFE = 2000.0
_PRIOR_ACCEPTED, _PRIOR_VERIFIED = 14.0, 20.0
# Measurements of a size whose median stands for it.
_MEMORY = 9


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
class LinearCost:
    """Seconds of a forward as a straight line in the number of tokens fed, from medians per size."""

    _samples: dict[int, deque[float]] = field(default_factory=dict)

    @property
    def num_sizes(self) -> int:
        return len(self._samples)

    def add(self, num_tokens: int, seconds: float) -> None:
        self._samples.setdefault(num_tokens, deque(maxlen=_MEMORY)).append(seconds)

    def line(self) -> tuple[float, float]:
        """(seconds at no tokens, seconds per token): least squares, neither of them negative."""
        sizes = list(self._samples)
        seconds = [statistics.median(samples) for samples in self._samples.values()]
        mean_size, mean_seconds = statistics.fmean(sizes), statistics.fmean(seconds)
        spread = sum((size - mean_size) ** 2 for size in sizes)
        slope = 0.0
        if spread:
            pairs = zip(sizes, seconds, strict=True)
            slope = sum((size - mean_size) * (s - mean_seconds) for size, s in pairs) / spread
        # More tokens are never cheaper, and no tokens never cost less than nothing.
        slope = min(max(slope, 0.0), mean_seconds / mean_size)
        return mean_seconds - slope * mean_size, slope


class AdaptiveDraftLength:
    """argmin over G of (G c_student(R) + c_teacher(R G)) / E(a, G), all three measured."""

    def __init__(self, max_draft_tokens: int = MAX_DRAFT_TOKENS) -> None:
        self._max = max_draft_tokens
        self._student, self._teacher = LinearCost(), LinearCost()
        self._accepted, self._verified = _PRIOR_ACCEPTED, _PRIOR_VERIFIED
        self._rounds = 0

    @property
    def acceptance_rate(self) -> float:
        """Running estimate of a."""
        return self._accepted / self._verified

    def choose(self, num_rows: int, longest_remaining: int) -> int:
        most = min(self._max, longest_remaining)
        if self._rounds < len(_TRIALS):
            return min(_TRIALS[self._rounds], most)
        student, student_slope = self._student.line()
        teacher, teacher_slope = self._teacher.line()
        step = student + student_slope * num_rows

        def seconds_per_token(num_draft: int) -> float:
            verification = teacher + teacher_slope * num_rows * num_draft
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
