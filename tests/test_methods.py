"""The table of methods: what each row means, and that nothing else is let in."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from axolotl_skd.methods import METHODS, LossRecipe, get_method
from axolotl_skd.rollout.types import Source

# name -> source, loss, needs a teacher, needs the data set's completions, samples
EXPECTED = {
    "skd": (Source.INTERLEAVED, LossRecipe.DIVERGENCE, True, False, True),
    "on_policy_kd": (Source.STUDENT, LossRecipe.DIVERGENCE, True, False, True),
    "supervised_kd": (Source.DATASET, LossRecipe.DIVERGENCE, True, True, False),
    "speckd": (Source.DATASET, LossRecipe.DIVERGENCE, True, True, False),
    "imitkd": (Source.STUDENT, LossRecipe.DIVERGENCE, True, True, True),
    "gkd": (Source.STUDENT, LossRecipe.DIVERGENCE, True, True, True),
    "mixed_skd": (Source.INTERLEAVED, LossRecipe.DIVERGENCE, True, True, True),
    "two_stage": (Source.STUDENT, LossRecipe.DIVERGENCE, True, True, True),
    "seqkd": (Source.TEACHER, LossRecipe.CROSS_ENTROPY, True, False, True),
    "sft": (Source.DATASET, LossRecipe.CROSS_ENTROPY, False, True, False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_row_says_what_the_paper_says(name: str) -> None:
    row = get_method(name)
    flags = (row.needs_teacher, row.needs_completions, row.rolls_out)
    assert (row.source, row.loss, *flags) == EXPECTED[name]


def test_rows_can_not_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        get_method("skd").loss = LossRecipe.CROSS_ENTROPY


def test_rows_differ_and_describe_themselves() -> None:
    kinds = {
        (row.source, row.loss, row.share, row.divergence, row.gated) for row in METHODS.values()
    }
    assert len(kinds) == len(METHODS)
    summaries = [row.summary for row in METHODS.values()]
    assert all(summaries) and len(set(summaries)) == len(METHODS)


@pytest.mark.parametrize(
    ("name", "near"),
    [("sdk", "skd"), ("on_policy", "on_policy_kd"), ("SFT", None), ("supervised", "supervised_kd")],
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(ValueError) as refusal:
        get_method(name)
    message = str(refusal.value)
    assert f"distillation.method: there is no method {name!r}." in message
    assert message.endswith(f"Known: {', '.join(METHODS)}.")
    if near:
        assert f"Did you mean {near!r}?" in message


def test_an_unknown_method_that_resembles_nothing_gets_no_guess() -> None:
    with pytest.raises(ValueError) as refusal:
        get_method("xxxxxxxx")
    assert "Did you mean" not in str(refusal.value)
