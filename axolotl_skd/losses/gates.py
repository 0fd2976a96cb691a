"""Gates on tokens' losses: which tokens the student learns from in full (SpecKD, SelecTKD).

A gated loss is (1 / |y|) sum_t V_t D(p_t || q_t) with V_t = 1 where the gate accepts and
`reject_weight` where it does not; V_t carries no gradient and the normaliser stays |y|. Of SpecKD only
the abstract was available to us, so the defaults (the `top_k` rule, k = 5, rejected tokens masked out)
are our reading of it.

Legend: N tokens, V vocabulary; p teacher, q student in formulas only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from axolotl_skd.losses.divergences import Divergence, ValueAndGradient, scaled

Gate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student logits [N, V], teacher logits [N, V], uniforms float64 [N]) -> accepted, bool [N]"""


def accept_top_k(
    student_logits: Tensor, teacher_logits: Tensor, uniforms: Tensor, top_k: int
) -> Tensor:
    """Is the student's most likely token among the teacher's `top_k`?

    As in the rollout: iff fewer than `top_k` of the teacher's logits are strictly greater than that
    token's own.
    """
    own = teacher_logits.gather(1, student_logits.argmax(dim=1, keepdim=True))
    return (teacher_logits > own).sum(dim=1) < top_k


def accept_speculative(
    student_logits: Tensor, teacher_logits: Tensor, uniforms: Tensor, top_k: int
) -> Tensor:
    """Is any of `top_k` draws from q accepted, each with probability min(1, p / q)?

    One draw is accepted with probability a = sum_v min(p_v, q_v), so any of k with 1 - (1 - a)^k: one
    uniform number a token decides the same event, and nothing is drawn from the vocabulary.
    """
    student, teacher = (
        torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
        for logits in (student_logits, teacher_logits)
    )
    overlap = torch.minimum(student, teacher).sum(dim=1).double()
    return uniforms >= (1 - overlap).clamp(min=0) ** top_k


GATES: dict[str, Callable[[int], Gate]] = {
    "top_k": lambda top_k: partial(accept_top_k, top_k=top_k),
    "speculative": lambda top_k: partial(accept_speculative, top_k=top_k),
}


def get_gate(rule: str, top_k: int) -> Gate:
    """A gate by its configured name.

    Args:
        rule: a key of `GATES`.
        top_k: k, the teacher's best tokens or the number of draws.
    """
    return GATES[rule](top_k)


def gated(
    divergence: Divergence, gate: Gate, reject_weight: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor], ValueAndGradient]:
    """V_t D(p_t || q_t) of N tokens.

    The gate sees both models' own distributions, whatever the temperature of the divergence.

    Returns:
        (student logits, teacher logits, uniforms, accepted bool [N]) -> the loss; the gate's verdicts
        are written into `accepted`.
    """

    def loss(
        student_logits: Tensor, teacher_logits: Tensor, uniforms: Tensor, accepted: Tensor
    ) -> ValueAndGradient:
        accepted.copy_(gate(student_logits, teacher_logits, uniforms))
        ungated = divergence(student_logits, teacher_logits)
        weights = torch.ones_like(ungated.values).masked_fill_(~accepted, reject_weight)
        return scaled(ungated, weights)

    return loss
