"""Log values are sums over counts, so that ranks and windows of unequal size weigh what they count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from axolotl_skd.metrics import Counters, rollout_metrics
from axolotl_skd.rollout.types import FinishReason, Rollout, Source

CPU = torch.device("cpu")

# G = 3. Row 0: rounds [keep keep keep] [keep replace -] = 5 tokens, 4 accepted, 6 proposed, runs into
# the limit. Row 1: [replace - -] = 1 token, 0 accepted, 3 proposed, stops. Row 2: [keep keep keep]
# [keep keep] = 5 tokens, 5 accepted, 5 proposed, runs into the limit.
ROLLOUT = Rollout(
    completion_ids=torch.tensor([[5, 6, 7, 8, 9], [2, 0, 0, 0, 0], [4, 4, 4, 4, 4]]),
    completion_mask=torch.tensor([[True] * 5, [True] + [False] * 4, [True] * 5]),
    accepted_mask=torch.tensor([[True] * 4 + [False], [False] * 5, [True] * 5]),
    proposed_ids=torch.tensor([[5, 6, 7, 8, 4], [3, -1, -1, -1, -1], [4, 4, 4, 4, 4]]),
    teacher_hidden=None,
    finish_reasons=torch.tensor([FinishReason.LENGTH, FinishReason.STOP, FinishReason.LENGTH]),
    num_proposed=torch.tensor([6, 3, 5]),
    source=Source.INTERLEAVED,
    num_rounds=2,
    num_draft_steps=6,  # G = 3 in both
)


def alone(values: Tensor) -> Tensor:
    return values


def values(rollout: Rollout, seconds: float = 2.0) -> dict[str, float]:
    counters = Counters()
    counters.add(rollout_metrics(rollout, rollout.source, seconds))
    return counters.pop(alone, CPU)


def test_an_interleaved_rollout_by_hand() -> None:
    assert values(ROLLOUT) == pytest.approx(
        {
            "skd/acceptance_rate": 9
            / 11,  # accepted / verified: every committed token was verified
            "rollout/draft_efficiency": 11 / 14,  # committed / proposed
            "rollout/draft_length": 3.0,
            "rollout/length": 11 / 3,
            "rollout/truncated_share": 2 / 3,
            "rollout/tokens_per_second": 5.5,
            "rollout/seconds": 2.0,
        }
    )


@pytest.mark.parametrize("source", [Source.STUDENT, Source.TEACHER])
def test_rollouts_of_one_model_have_no_acceptance(source: Source) -> None:
    assert set(values(replace(ROLLOUT, source=source))) == {
        "rollout/length",
        "rollout/truncated_share",
        "rollout/tokens_per_second",
        "rollout/seconds",
    }


def test_values_are_ratios_of_sums_not_means_of_ratios() -> None:
    counters = Counters()
    counters.add({"rate": (1, 1)})
    counters.add({"rate": (0, 9)})
    assert counters.pop(alone, CPU) == pytest.approx({"rate": 0.1})


def test_ranks_are_summed_before_dividing() -> None:
    # The other rank: 5 of 30 and 40 over 2, names in alphabetical order on every rank.
    others = torch.tensor([[5.0, 30.0], [40.0, 2.0]])
    counters = Counters()
    counters.add({"b/length": (10, 3), "a/rate": (10, 20)})
    assert counters.pop(lambda local: local + others, CPU) == pytest.approx(
        {"a/rate": 15 / 50, "b/length": 50 / 5}
    )


def test_equal_ranks_change_nothing() -> None:
    once, twice = Counters(), Counters()
    for counters in (once, twice):
        counters.add(rollout_metrics(ROLLOUT, ROLLOUT.source, 2.0))
    assert once.pop(alone, CPU) == pytest.approx(twice.pop(lambda local: 2 * local, CPU))


def test_values_start_anew_after_each_line() -> None:
    counters = Counters()
    counters.add({"rate": (1, 1)})
    counters.pop(alone, CPU)
    assert counters.pop(alone, CPU) == {}
    counters.add({"rate": (0, 4)})
    assert counters.pop(alone, CPU) == {"rate": 0.0}


def test_nothing_is_reduced_when_nothing_was_counted() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("a collective call for nothing")

    assert Counters().pop(refuse, CPU) == {}


def test_a_count_of_zero_is_left_out() -> None:
    counters = Counters()
    counters.add({"rate": (0, 0), "length": (4, 2)})
    assert counters.pop(alone, CPU) == {"length": 2.0}


def test_a_window_without_rollouts_has_the_same_names() -> None:
    """Ranks add their counters name by name, also when one of them rolled nothing out."""
    nothing = rollout_metrics(None, Source.INTERLEAVED, 0.25)
    assert nothing.keys() == rollout_metrics(ROLLOUT, Source.INTERLEAVED, 2.0).keys()
    counters = Counters()
    counters.add(nothing)
    assert counters.pop(alone, CPU) == pytest.approx(
        {"rollout/tokens_per_second": 0.0, "rollout/seconds": 0.25}
    )
