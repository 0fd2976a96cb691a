"""Counts of speculative decoding, reconstructed from what the teacher was fed and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add


@dataclass(frozen=True, slots=True)
class SpeculationCounts:
    """Tokens and teacher calls of one or more completions.

    A proposal behind a rejected one is thrown away without a verdict: it counts as proposed, not as
    verified. Every committed token is an accepted proposal, the teacher's replacement of a rejected
    one, or the token that the teacher adds when nothing was rejected.

    Attributes:
        proposed: tokens that the student drafted.
        verified: those that got a verdict: accepted, or the first of their round to be rejected.
        accepted: those that were kept.
        teacher_calls: forwards of the teacher; the one that reads the prompt verifies as well.
        tokens: committed tokens, the stop token included.
    """

    proposed: int = 0
    verified: int = 0
    accepted: int = 0
    teacher_calls: int = 0
    tokens: int = 0

    def __add__(self, other: SpeculationCounts) -> SpeculationCounts:
        return SpeculationCounts(
            proposed=self.proposed + other.proposed,
            verified=self.verified + other.verified,
            accepted=self.accepted + other.accepted,
            teacher_calls=self.teacher_calls + other.teacher_calls,
            tokens=self.tokens + other.tokens,
        )

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / verified, None where nothing was proposed."""
        return self.accepted / self.verified if self.verified else None

    @property
    def tokens_per_teacher_call(self) -> float:
        return self.tokens / self.teacher_calls


def total(counts: Sequence[SpeculationCounts]) -> SpeculationCounts:
    return reduce(add, counts, SpeculationCounts())


def count_speculation(
    proposals: Sequence[Sequence[int]], completion: Sequence[int]
) -> SpeculationCounts:
    """The counts of one completion.

    Exact for greedy decoding and for speculative sampling: a rejected proposal is never replaced by
    itself (it is not the argmax, or has no mass in max(p - q, 0)), so the accepted ones are those
    that the completion repeats.

    Args:
        proposals: for each teacher call the ids that it verified, possibly none.
        completion: the ids that were committed.

    Raises:
        RuntimeError: the calls do not add up to the completion.
    """
    position = verified = accepted = 0
    for proposal in proposals:
        kept = _common_prefix(proposal, completion[position:])
        position += kept
        accepted += kept
        verified += kept
        # Only a stop token at the end of an accepted proposal leaves the teacher nothing to add.
        if position < len(completion):
            position += 1
            verified += kept < len(proposal)
    if position != len(completion) or not proposals:
        raise RuntimeError(
            f"{len(proposals)} teacher calls account for {position} of {len(completion)} tokens: this "
            "version of transformers feeds the teacher in a way that is not known here."
        )
    return SpeculationCounts(
        proposed=sum(map(len, proposals)),
        verified=verified,
        accepted=accepted,
        teacher_calls=len(proposals),
        tokens=len(completion),
    )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        length += 1
    return length
