"""Per-token divergences and cross-entropy: readable definitions, in float32 or better.

Every divergence is zero iff the two distributions are equal and never negative. Tokens of
probability zero contribute their limit, so logits of -inf give no NaN, in value or gradient.

Legend: N tokens, V vocabulary; p teacher, q student in formulas only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

_FLOOR = -1e4

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student logits [N, V], teacher logits [N, V], constant) -> [N]"""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q), SKD paper eq. 1: mass-covering."""
    return _kl(_logprobs(teacher_logits), _logprobs(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(q || p): mode-seeking. Infinite where the student puts mass that the teacher excludes."""
    return _kl(_logprobs(student_logits), _logprobs(teacher_logits))


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (GKD)."""
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    mixture = _log_mixture(teacher, student, beta)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM)."""
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    return _kl(teacher, _log_mixture(teacher, student, alpha))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM)."""
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    return _kl(student, _log_mixture(student, teacher, alpha))


def tvd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Total variation, 1/2 sum_v |p_v - q_v|: at most 1."""
    student, teacher = _logprobs(student_logits).exp(), _logprobs(teacher_logits).exp()
    return 0.5 * (teacher - student).abs().sum(dim=-1)


def at_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """The divergence of both distributions at a temperature, without a factor of its square."""
    if temperature == 1:
        return divergence
    return lambda student, teacher: divergence(
        _raised(student) / temperature, _raised(teacher) / temperature
    )


def cross_entropy(student_logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log q(token): [N, V], int64 [N] -> [N]."""
    return functional.nll_loss(_logprobs(student_logits), token_ids, reduction="none")


def get_divergence(name: str, *, beta: float, alpha: float, temperature: float) -> Divergence:
    """A divergence by its configured name.

    Args:
        name: a key of `DIVERGENCES`.
        beta: of `jsd`.
        alpha: of the skewed ones.
        temperature: of both distributions.
    """
    return at_temperature(DIVERGENCES[name](beta, alpha), temperature)


DIVERGENCES: dict[str, Callable[[float, float], Divergence]] = {
    "forward_kl": lambda beta, alpha: forward_kl,
    "reverse_kl": lambda beta, alpha: reverse_kl,
    "jsd": lambda beta, alpha: partial(jsd, beta=beta),
    "skew_kl": lambda beta, alpha: partial(skew_kl, alpha=alpha),
    "skew_reverse_kl": lambda beta, alpha: partial(skew_reverse_kl, alpha=alpha),
    "tvd": lambda beta, alpha: tvd,
}


def _logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(_raised(logits), dim=-1)


def _raised(logits: Tensor) -> Tensor:
    """Half precision as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """sum_v exp(first_v) (first_v - second_v) of log-probabilities [N, V] -> [N]."""
    probabilities = first.exp()
    possible = probabilities > 0
    difference = torch.where(possible, first, 0.0) - torch.where(possible, second, 0.0)
    return (probabilities * difference).sum(dim=-1)


def _log_mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """log(weight exp(first) + (1 - weight) exp(second))"""
    # Where both are impossible logaddexp has no gradient; exp(floor) is 0 in every precision.
    first, second = first.clamp(min=_FLOOR), second.clamp(min=_FLOOR)
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))
