"""Per-token divergences and cross-entropy: value and gradient in closed form, in float32 or better.

Every divergence is zero iff the two distributions are equal and never negative. Tokens of
probability zero contribute their limit, so logits of -inf give no NaN, in value or gradient.

With q = softmax(z) and g = dD/dq, the gradient in the logits z is q (g - sum_v q_v g_v): a constant
added to g changes nothing, so each g below is given without its constant.

Legend: N tokens, V vocabulary; p teacher, q student in formulas only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

# A mixture's log-probability where both its parts are impossible: exp(floor) is 0 in every precision.
_FLOOR = -1e4


@dataclass(frozen=True, slots=True)
class ValueAndGradient:
    """A loss of N tokens.

    Attributes:
        values: [N].
        gradient: computes d values / d student logits [N, V]; whoever wants values alone never calls.
    """

    values: Tensor
    gradient: Callable[[], Tensor]


Divergence = Callable[[Tensor, Tensor], ValueAndGradient]
"""(student logits [N, V], teacher logits [N, V])"""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> ValueAndGradient:
    """KL(p || q), SKD paper eq. 1: mass-covering; g = -p / q."""
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    teacher_probs = teacher.exp()
    values = _mean(teacher_probs, _log_ratio(teacher_probs, teacher, student))
    return ValueAndGradient(values, lambda: student.exp() - teacher_probs)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> ValueAndGradient:
    """KL(q || p): mode-seeking; g = log(q / p).

    Infinite where the student puts mass that the teacher excludes.
    """
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    student_probs = student.exp()
    log_ratio = _log_ratio(student_probs, student, teacher)
    values = _mean(student_probs, log_ratio)
    return ValueAndGradient(values, lambda: _through_softmax(student_probs, log_ratio))


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> ValueAndGradient:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (GKD).

    g = (1 - beta) log(q / m).
    """
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    student_probs, teacher_probs = student.exp(), teacher.exp()
    mixture = _log_mixture(teacher, student, beta)
    log_ratio = _log_ratio(student_probs, student, mixture)
    values = beta * _mean(teacher_probs, _log_ratio(teacher_probs, teacher, mixture))
    values += (1 - beta) * _mean(student_probs, log_ratio)
    return ValueAndGradient(values, lambda: (1 - beta) * _through_softmax(student_probs, log_ratio))


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> ValueAndGradient:
    """KL(p || m), m = alpha p + (1 - alpha) q (DistiLLM); g = -(1 - alpha) p / m."""
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    teacher_probs = teacher.exp()
    mixture = _log_mixture(teacher, student, alpha)
    values = _mean(teacher_probs, _log_ratio(teacher_probs, teacher, mixture))

    def gradient() -> Tensor:
        return (alpha - 1) * _through_softmax(student.exp(), (teacher - mixture).exp())

    return ValueAndGradient(values, gradient)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float
) -> ValueAndGradient:
    """KL(q || m), m = (1 - alpha) p + alpha q (DistiLLM); g = log(q / m) - alpha q / m."""
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    student_probs = student.exp()
    mixture = _log_mixture(student, teacher, alpha)
    log_ratio = _log_ratio(student_probs, student, mixture)
    values = _mean(student_probs, log_ratio)
    return ValueAndGradient(
        values, lambda: _through_softmax(student_probs, log_ratio - alpha * log_ratio.exp())
    )


def tvd(student_logits: Tensor, teacher_logits: Tensor) -> ValueAndGradient:
    """Total variation, 1/2 sum_v |p_v - q_v|: at most 1; g = sign(q - p) / 2."""
    student_probs = _logprobs(student_logits).exp()
    difference = student_probs - _logprobs(teacher_logits).exp()
    values = 0.5 * difference.abs().sum(dim=-1)
    return ValueAndGradient(
        values, lambda: 0.5 * _through_softmax(student_probs, difference.sign())
    )


def at_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """The divergence of both distributions at a temperature, without a factor of its square."""
    if temperature == 1:
        return divergence

    def tempered(student_logits: Tensor, teacher_logits: Tensor) -> ValueAndGradient:
        loss = divergence(
            _raised(student_logits) / temperature, _raised(teacher_logits) / temperature
        )
        return ValueAndGradient(loss.values, lambda: loss.gradient() / temperature)

    return tempered


def scaled(loss: ValueAndGradient, weights: Tensor) -> ValueAndGradient:
    """The losses times constants [N]; a weight of zero leaves nothing, not even of an infinite loss."""
    nothing = weights == 0
    return ValueAndGradient(
        (loss.values * weights).masked_fill_(nothing, 0.0),
        lambda: (loss.gradient() * weights[:, None]).masked_fill_(nothing[:, None], 0.0),
    )


def cross_entropy(student_logits: Tensor, token_ids: Tensor) -> ValueAndGradient:
    """-log q(token): [N, V], int64 [N]; the gradient is q - 1[token]."""
    student = _logprobs(student_logits)
    index = token_ids[:, None]

    def gradient() -> Tensor:
        return student.exp().scatter_add_(1, index, student.new_full((), -1.0).expand_as(index))

    return ValueAndGradient(-student.gather(1, index)[:, 0], gradient)


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


def _mean(probs: Tensor, values: Tensor) -> Tensor:
    """sum_v probs_v values_v [N]"""
    # No vecdot here: autocast would round its factors to half precision.
    return (probs * values).sum(dim=-1)


def _log_ratio(probs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """first - second of log-probabilities, 0 at `probs` 0, where it may be infinite or no number."""
    return (first - second).masked_fill_(probs == 0, 0.0)


def _through_softmax(probs: Tensor, slope: Tensor) -> Tensor:
    """From the gradient in probabilities to the one in logits, [N, V] each."""
    return probs * (slope - (probs * slope).sum(dim=-1, keepdim=True))


def _log_mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """log(weight exp(first) + (1 - weight) exp(second)), floored."""
    mixture = torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))
    return mixture.clamp_(min=_FLOOR)
