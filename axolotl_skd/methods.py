"""The table of methods: what trains on which completions, with which loss.

A method is a completion source, a share of rows that it completes, and a loss recipe (SKD paper,
sections 2, 3 and 5.5). Adding one is adding a row here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import Enum

from axolotl_skd.rollout.types import Source


class LossRecipe(str, Enum):
    """What the student learns at each token of a completion."""

    CROSS_ENTROPY = "cross_entropy"  # the token itself
    DIVERGENCE = "divergence"  # the teacher's whole distribution


class Share(str, Enum):
    """Which rows get a completion from the source; the others keep the data set's."""

    ALL = "all"
    HALF = "half"  # a fair coin per sequence
    LMBDA = "lmbda"  # a coin of probability `distillation.lmbda` per sequence
    LATE = "late"  # none before `distillation.switch_at` of all steps, then all


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        source: where completions come from.
        loss: what is learned on them.
        summary: one line for people.
        share: which rows the source completes.
        divergence: the default of `distillation.loss.divergence`.
        gated: is there a gate on the loss where `distillation.gate` does not say which?
    """

    source: Source
    loss: LossRecipe
    summary: str
    share: Share = Share.ALL
    divergence: str = "forward_kl"
    gated: bool = False

    @property
    def needs_teacher(self) -> bool:
        return self.loss is LossRecipe.DIVERGENCE or self.source in (
            Source.TEACHER,
            Source.INTERLEAVED,
        )

    @property
    def needs_completions(self) -> bool:
        """Does training read the data set's own completions?"""
        return self.source is Source.DATASET or self.share is not Share.ALL

    @property
    def rolls_out(self) -> bool:
        return self.source is not Source.DATASET


METHODS: dict[str, Method] = {
    "skd": Method(
        Source.INTERLEAVED,
        LossRecipe.DIVERGENCE,
        "the student proposes, the teacher verifies and replaces",
    ),
    "on_policy_kd": Method(
        Source.STUDENT, LossRecipe.DIVERGENCE, "divergence on the student's own completions"
    ),
    "supervised_kd": Method(
        Source.DATASET, LossRecipe.DIVERGENCE, "divergence on the data set's completions"
    ),
    "speckd": Method(
        Source.DATASET,
        LossRecipe.DIVERGENCE,
        "divergence on the data set's completions, on the tokens that pass the gate",
        gated=True,
    ),
    "imitkd": Method(
        Source.STUDENT,
        LossRecipe.DIVERGENCE,
        "per sequence a fair coin: the student's completion or the data set's",
        share=Share.HALF,
    ),
    "gkd": Method(
        Source.STUDENT,
        LossRecipe.DIVERGENCE,
        "the student's completion with probability lmbda, else the data set's",
        share=Share.LMBDA,
        divergence="jsd",
    ),
    "mixed_skd": Method(
        Source.INTERLEAVED,
        LossRecipe.DIVERGENCE,
        "an interleaved completion with probability lmbda, else the data set's",
        share=Share.LMBDA,
    ),
    "two_stage": Method(
        Source.STUDENT,
        LossRecipe.DIVERGENCE,
        "the data set's completions first, after switch_at of the steps the student's",
        share=Share.LATE,
    ),
    "seqkd": Method(
        Source.TEACHER,
        LossRecipe.CROSS_ENTROPY,
        "fine-tuning on what the teacher wrote, once for all",
    ),
    "sft": Method(
        Source.DATASET, LossRecipe.CROSS_ENTROPY, "fine-tuning on the data set's completions"
    ),
}


def get_method(name: str) -> Method:
    """The row called `name`.

    Raises:
        ValueError: there is none; names the nearest.
    """
    try:
        return METHODS[name]
    except KeyError:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"distillation.method: there is no method {name!r}.{hint} Known: {', '.join(METHODS)}."
        ) from None
