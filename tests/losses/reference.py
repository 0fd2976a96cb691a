"""The token losses as one would write them on a board, for automatic differentiation in float64.

Independent of the package: probabilities and logarithms of their ratios, no log-softmax, no closed
gradient. For positive probabilities only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BETA, ALPHA = 0.3, 0.1


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(dim=-1)


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    middle = BETA * p + (1 - BETA) * q
    return BETA * _kl(p, middle) + (1 - BETA) * _kl(q, middle)


DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: _kl(p, q),
    "reverse_kl": lambda p, q: _kl(q, p),
    "jsd": _jsd,
    "skew_kl": lambda p, q: _kl(p, ALPHA * p + (1 - ALPHA) * q),
    "skew_reverse_kl": lambda p, q: _kl(q, (1 - ALPHA) * p + ALPHA * q),
    "tvd": lambda p, q: (p - q).abs().sum(dim=-1) / 2,
}
"""(teacher's probabilities [N, V], student's) -> [N]"""


def plain_divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Divergences [N] of logits [N, V], differentiable in the student's."""
    p, q = (torch.softmax(x / temperature, dim=-1) for x in (teacher_logits, student_logits))
    return DEFINITIONS[name](p, q)


def plain_cross_entropy(student_logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log q(token): [N, V], int64 [N] -> [N]."""
    return -torch.softmax(student_logits, dim=-1)[torch.arange(len(token_ids)), token_ids].log()
