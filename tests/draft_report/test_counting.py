"""Counts from what the teacher verified and what came out, worked out by hand."""

from __future__ import annotations

import pytest

from axolotl_skd.draft_report.counting import SpeculationCounts, count_speculation, total


@pytest.mark.parametrize(
    ("proposals", "completion", "expected"),
    [
        # All accepted, the teacher adds one; then a rejection with one proposal thrown away.
        ([[1, 2, 3], [5, 6, 7]], [1, 2, 3, 4, 5, 9], (6, 5, 4, 2, 6)),
        # The first is rejected: only the teacher's token is committed.
        ([[1, 2, 3]], [9], (3, 1, 0, 1, 1)),
        # An accepted stop token ends it without a token of the teacher.
        ([[1, 0]], [1, 0], (2, 2, 2, 1, 2)),
        # A rejected stop token does not.
        ([[1, 0], [2]], [1, 5, 2, 0], (3, 3, 2, 2, 4)),
        # The last call of a full completion has nothing to verify.
        ([[1], []], [1, 2, 3], (1, 1, 1, 2, 3)),
        ([[]], [3], (0, 0, 0, 1, 1)),
        # What the proposal repeats after the end of the completion is no acceptance.
        ([[4, 4, 4]], [4, 4], (3, 2, 2, 1, 2)),
    ],
)
def test_hand_made_rounds(
    proposals: list[list[int]], completion: list[int], expected: tuple[int, ...]
) -> None:
    assert count_speculation(proposals, completion) == SpeculationCounts(*expected)


@pytest.mark.parametrize(
    ("proposals", "completion"), [([[1]], [1, 2, 3]), ([], [1]), ([], []), ([[9]], [1, 2])]
)
def test_calls_that_do_not_add_up_are_refused(
    proposals: list[list[int]], completion: list[int]
) -> None:
    with pytest.raises(RuntimeError, match="account for"):
        count_speculation(proposals, completion)


def test_rates_and_sums() -> None:
    counts = total([SpeculationCounts(6, 5, 4, 2, 6), SpeculationCounts(3, 1, 0, 1, 1)])
    assert counts == SpeculationCounts(9, 6, 4, 3, 7)
    assert counts.acceptance_rate == 4 / 6
    assert counts.tokens_per_teacher_call == 7 / 3
    assert SpeculationCounts(0, 0, 0, 1, 1).acceptance_rate is None
