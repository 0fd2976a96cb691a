"""K of the acceptance test over a run: constant, on a schedule, or steered to an acceptance rate.

K is constant within an optimizer step. A schedule knows the share of the steps that are done; the
controller hears the step's counts over all ranks, so that all ranks take the same K, and its state is
kept in the checkpoint, so that a resumed run takes the K that it would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class TopKPolicy(Protocol):
    def choose(self, progress: float) -> int:
        """K of the next step.

        Args:
            progress: share of all optimizer steps that are done.
        """

    def observe(self, num_accepted: int, num_verified: int) -> None:
        """Learn from a step's rollout on this rank; called once a step, on every rank."""


@dataclass(frozen=True, slots=True)
class ScheduledTopK:
    """From `start` to `end`: with progress s, along the straight line, or

        end + (start - end) (1 + cos(pi s)) / 2,

    rounded. `end` is what the last step approaches; s = 1 would be the step after it.
    """

    start: int
    end: int
    schedule: Literal["linear", "cosine"] = "linear"

    def choose(self, progress: float) -> int:
        done = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return round(self.start + (self.end - self.start) * done)

    def observe(self, num_accepted: int, num_verified: int) -> None:
        """Nothing to learn."""


class TargetAcceptance:
    """Steers K so that the acceptance rate stays at a target: an integral controller of log K,

        log K <- log K + GAIN (target - accepted / verified),  1 <= K <= largest,

    once a step, by the counts of all ranks. A target of 0 leads to K = 1, one of 1 upwards until
    everything is accepted.
    """

    # Where the rate rises by r per factor e in K, a step takes away the share GAIN r of the deviation:
    # no overshooting below r = 1, no oscillation without end below r = 2.
    GAIN = 1.0

    def __init__(
        self, target: float, start: int, largest: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """
        Args:
            target: acceptance rate, in [0, 1].
            start: K of the first step.
            largest: K of a vocabulary.
            sum_over_ranks: of an int64 tensor on the CPU.
        """
        self._target = target
        self._sum_over_ranks = sum_over_ranks
        self._largest = math.log(largest)
        self.log_top_k = math.log(start)
        """The whole state."""

    def choose(self, progress: float) -> int:
        return round(math.exp(self.log_top_k))

    def observe(self, num_accepted: int, num_verified: int) -> None:
        counts = self._sum_over_ranks(torch.tensor([num_accepted, num_verified]))
        accepted, verified = counts.tolist()
        if verified == 0:
            return
        moved = self.log_top_k + self.GAIN * (self._target - accepted / verified)
        self.log_top_k = min(max(moved, 0.0), self._largest)
