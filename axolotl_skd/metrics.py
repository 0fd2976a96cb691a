"""Counters of the log lines: every value is a sum over a count, reduced over ranks as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from axolotl_skd.rollout.types import FinishReason, Rollout, Source

Ratio = tuple[float, float]
"""(sum, count)"""

# Rows left out of the loss, per optimizer step over all ranks.
SKIPPED_ROWS = "loss/skipped_rows"


@dataclass
class Counters:
    """Ratios by name, accumulated between two log lines."""

    _totals: dict[str, list[float]] = field(default_factory=dict)

    def add(self, ratios: Mapping[str, Ratio]) -> None:
        for name, (total, count) in ratios.items():
            entry = self._totals.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += count

    def pop(self, reduce_sum: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The values over all ranks, and start anew.

        Args:
            reduce_sum: sums a tensor over ranks. All ranks must hold the same names.
            device: where that tensor has to be.
        """
        names = sorted(self._totals)
        if not names:
            return {}
        local = torch.tensor(
            [self._totals[name] for name in names], dtype=torch.float64, device=device
        )
        self._totals.clear()
        totals = reduce_sum(local).tolist()
        return {
            name: total / count
            for name, (total, count) in zip(names, totals, strict=True)
            if count > 0
        }


def rollout_metrics(rollout: Rollout | None, source: Source, seconds: float) -> dict[str, Ratio]:
    """What a rollout says of itself; the same names where no row of the window was rolled out.

    Every committed token of an interleaved rollout but a bonus token is one verified proposal, kept
    or replaced; proposals behind the first rejected one are never verified.

    Args:
        rollout: of one accumulation window, None if it has none.
        source: which model(s) would have sampled.
        seconds: wall-clock time that it took on this rank.
    """
    rows = tokens = truncated = accepted = verified = proposed = steps = rounds = 0
    if rollout is not None:
        rows, tokens = len(rollout.finish_reasons), int(rollout.completion_mask.sum())
        truncated = int((rollout.finish_reasons == FinishReason.LENGTH).sum())
        accepted, proposed = int(rollout.accepted_mask.sum()), int(rollout.num_proposed.sum())
        verified = int((rollout.proposed_ids >= 0).sum())
        steps, rounds = rollout.num_draft_steps, rollout.num_rounds
    metrics: dict[str, Ratio] = {
        "rollout/length": (tokens, rows),
        "rollout/truncated_share": (truncated, rows),
        "rollout/tokens_per_second": (tokens, seconds),
        "rollout/seconds": (seconds, 1),
    }
    if source is Source.INTERLEAVED:
        metrics["skd/acceptance_rate"] = (accepted, verified)
        metrics["rollout/draft_efficiency"] = (tokens, proposed)
        metrics["rollout/draft_length"] = (steps, rounds)
    return metrics
