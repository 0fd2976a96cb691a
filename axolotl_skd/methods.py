"""The table of methods: what trains on which completions, with which loss.

A method is a completion source times a loss recipe (SKD paper, sections 2 and 3). Adding one is
adding a row here.
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


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        source: where completions come from.
        loss: what is learned on them.
        summary: one line for people.
    """

    source: Source
    loss: LossRecipe
    summary: str

    @property
    def needs_teacher(self) -> bool:
        return self.loss is LossRecipe.DIVERGENCE or self.source in (
            Source.TEACHER,
            Source.INTERLEAVED,
        )

    @property
    def needs_completions(self) -> bool:
        """Does training read the data set's own completions?"""
        return self.source is Source.DATASET

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
    "seqkd": Method(
        Source.TEACHER, LossRecipe.CROSS_ENTROPY, "fine-tuning on the teacher's completions"
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
