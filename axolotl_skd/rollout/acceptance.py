"""Which of the student's proposals the teacher keeps, and what takes the place of one that it does not.

Rules that look at the teacher alone are plain functions (`AcceptanceRule`); a rejected proposal is then
replaced by a token of the teacher's own. `RatioTest` compares both models: speculative sampling proper
(Leviathan et al. 2023, Chen et al. 2023), whose committed tokens are distributed as the teacher's.

Legend: R rows, G draft tokens, V vocabulary; p teacher, q student, x a proposal, in formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from axolotl_skd.rollout.sampling import GREEDY, top_k_accept_mask, warped_probs
from axolotl_skd.rollout.types import SamplingParams


class AcceptanceRule(Protocol):
    def __call__(
        self, teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
    ) -> Tensor:
        """Would each proposal be kept, were all before it kept?

        Args:
            teacher_logits: raw [R, G, V].
            proposed_ids: int64 [R, G].
            uniforms: float64 [R, G] in [0, 1), keyed by position, for rules that draw.
            params: of the rollout.

        Returns:
            bool [R, G]
        """


@dataclass(frozen=True, slots=True)
class Replacement:
    """What a replacement is sampled from: logits [R, V], and how `sample_top_p` warps them."""

    logits: Tensor
    temperature: float
    top_p: float


def accept_top_k(
    teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
) -> Tensor:
    """SKD's own rule: among the teacher's `teacher_top_k` (paper, Algorithm 1)."""
    return top_k_accept_mask(teacher_logits, proposed_ids, params.teacher_top_k)


def accept_top_p(
    teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
) -> Tensor:
    """Inside the teacher's nucleus of mass `acceptance_top_p`, at temperature 1.

    A token is inside iff what comes before it (probability descending, id ascending) has less than
    that mass, so the crossing token is; a mass of 1 accepts everything.
    """
    if params.acceptance_top_p == 1:
        return torch.ones_like(proposed_ids, dtype=torch.bool)
    # One position at a time: the float64 matrices are [R, V].
    before = [
        _mass_before(teacher_logits[:, i], proposed_ids[:, i]) for i in range(proposed_ids.shape[1])
    ]
    return torch.stack(before, dim=1) < params.acceptance_top_p


def accept_min_p(
    teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
) -> Tensor:
    """Probability at least `acceptance_min_p` times the teacher's largest, at temperature 1."""
    own = teacher_logits.gather(-1, proposed_ids.unsqueeze(-1)).squeeze(-1).double()
    return own - teacher_logits.amax(dim=-1).double() >= math.log(params.acceptance_min_p)


def teacher_replacement(teacher_logits: Tensor, params: SamplingParams) -> Replacement:
    """The teacher's own distribution [R, V], or its most likely token (ties to the lower id)."""
    if params.replacement == "argmax":
        return Replacement(teacher_logits, 1.0, GREEDY)
    return Replacement(teacher_logits, params.teacher_temperature, params.teacher_top_p)


@dataclass(frozen=True, slots=True)
class RatioTest:
    """Accept with probability min(1, p(x) / q(x)), replace from max(p - q, 0) normalised.

    p and q are the *warped* distributions, which both models really sample from, so that every
    committed token is distributed as a sample of the teacher's: P(x) = q min(1, p / q) + max(p - q, 0).
    """

    def proposal_probs(
        self, student_logits: Tensor, proposed_ids: Tensor, params: SamplingParams
    ) -> Tensor:
        """q(x) of one position: [R, V], int64 [R] -> float64 [R]."""
        probs = warped_probs(student_logits, params.student_temperature, params.student_top_p)
        return probs.gather(-1, proposed_ids[:, None])[:, 0]

    def accept(
        self,
        teacher_logits: Tensor,
        proposed_ids: Tensor,
        proposal_probs: Tensor,
        uniforms: Tensor,
        params: SamplingParams,
    ) -> Tensor:
        """As `AcceptanceRule`, with q(x) float64 [R, G]: bool [R, G], u q(x) < p(x)."""
        teacher_probs = [
            warped_probs(teacher_logits[:, i], params.teacher_temperature, params.teacher_top_p)
            .gather(-1, proposed_ids[:, i, None])
            .squeeze(-1)
            for i in range(proposed_ids.shape[1])
        ]
        return uniforms * proposal_probs < torch.stack(teacher_probs, dim=1)

    def replacement(
        self,
        teacher_logits: Tensor,
        student_logits: Tensor,
        proposed: Tensor,
        params: SamplingParams,
    ) -> Replacement:
        """The residual where the student proposed a token; p itself where it did not.

        Args:
            teacher_logits, student_logits: raw [R, V], of the position to be replaced.
            proposed: bool [R], False at a bonus token.
            params: of the rollout.
        """
        teacher = warped_probs(teacher_logits, params.teacher_temperature, params.teacher_top_p)
        student = warped_probs(student_logits, params.student_temperature, params.student_top_p)
        residual = (teacher - student * proposed[:, None]).clamp(min=0)
        # No residual means p = q, where nothing is ever rejected; but rows whose proposals were all
        # kept are sampled too, in vain.
        empty = ~(residual.sum(dim=-1, keepdim=True) > 0)
        return Replacement(torch.where(empty, teacher, residual).log(), 1.0, 1.0)


ACCEPTANCE_RULES: dict[str, AcceptanceRule | RatioTest] = {
    "top_k": accept_top_k,
    "top_p": accept_top_p,
    "min_p": accept_min_p,
    "speculative": RatioTest(),
}
"""By the values of `distillation.rollout.acceptance`."""


def _mass_before(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Mass of what comes before a token in the sampler's order: [R, V], int64 [R] -> float64 [R]."""
    own, ids = token_ids[:, None], torch.arange(logits.shape[-1], device=logits.device)
    value = logits.gather(-1, own)
    before = (logits > value) | ((logits == value) & (ids < own))
    return (logits.double().softmax(dim=-1) * before).sum(dim=-1)
