"""Per-token losses from logits: readable definitions, in float32 or better.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _logprobs(logits: Tensor) -> Tensor:
    """Normalised log-probabilities; half precision is raised to float32 first."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v teacher_v (log teacher_v - log student_v), SKD paper eq. 1.

    Zero iff the two are equal, never negative; a token that the teacher excludes (logit -inf)
    contributes nothing, whatever the student thinks of it.

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V], constant.

    Returns:
        [N]
    """
    student = _logprobs(student_logits)
    teacher = _logprobs(teacher_logits)
    probabilities = teacher.exp()
    possible = probabilities > 0
    difference = torch.where(possible, teacher, 0.0) - torch.where(possible, student, 0.0)
    return (probabilities * difference).sum(dim=-1)


def cross_entropy(student_logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log student(token): [N, V], int64 [N] -> [N]."""
    return functional.nll_loss(_logprobs(student_logits), token_ids, reduction="none")
