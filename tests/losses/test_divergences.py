"""The per-token losses equal their definitions, in value and gradient, at every precision.

The reference goes another way than the code: numpy, float64, probabilities by exponentials and sums,
logarithms of ratios, and gradients in closed form (d KL / d logits = student - teacher).
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_skd.losses.divergences import ValueAndGradient, cross_entropy, forward_kl

N, V = 7, 33
LOW_PRECISION = [torch.bfloat16, torch.float16]


def random_logits(seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, V, generator=generator, dtype=torch.float64)


def random_tokens(seed: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))


def probabilities(logits: Tensor) -> np.ndarray:
    weights = np.exp(logits.detach().double().numpy())
    return weights / weights.sum(axis=-1, keepdims=True)


def reference_kl(student_logits: Tensor, teacher_logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """sum over the teacher's support of t log(t / s), and its gradient in the student's logits."""
    student, teacher = probabilities(student_logits), probabilities(teacher_logits)
    values = np.zeros(len(student))
    for row in range(len(student)):
        for t, s in zip(teacher[row], student[row], strict=True):
            if t > 0:
                values[row] += t * np.log(t / s)
    return values, student - teacher


def reference_ce(student_logits: Tensor, token_ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    student = probabilities(student_logits)
    rows, ids = np.arange(len(student)), token_ids.numpy()
    gradient = student.copy()
    gradient[rows, ids] -= 1.0
    return -np.log(student[rows, ids]), gradient


def evaluate(
    loss: Callable[[Tensor, Tensor], ValueAndGradient], logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum in `logits`."""
    result = loss(logits, targets)
    return result.values, result.gradient()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_forward_kl_is_its_definition(scale: float) -> None:
    student, teacher = random_logits(0, scale), random_logits(1, scale)
    losses, gradient = evaluate(forward_kl, student, teacher)
    expected, expected_gradient = reference_kl(student, teacher)
    np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_cross_entropy_is_its_definition(scale: float) -> None:
    student, tokens = random_logits(0, scale), random_tokens(2)
    losses, gradient = evaluate(cross_entropy, student, tokens)
    expected, expected_gradient = reference_ce(student, tokens)
    np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_forward_kl_runs_from_teacher_to_student() -> None:
    # teacher (1/2, 1/2), student (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3); the other way round it would be
    # 1/4 log(1/2) + 3/4 log(3/2).
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert forward_kl(student, teacher).values.item() == pytest.approx(0.5 * log(4 / 3), rel=1e-12)
    assert forward_kl(teacher, student).values.item() == pytest.approx(
        0.75 * log(3 / 2) - 0.25 * log(2), rel=1e-12
    )


def test_cross_entropy_by_hand() -> None:
    student = torch.tensor([[0.25, 0.75], [0.25, 0.75]], dtype=torch.float64).log()
    losses = cross_entropy(student, torch.tensor([0, 1])).values
    assert losses.tolist() == pytest.approx([log(4), log(4 / 3)], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION])
def test_forward_kl_is_zero_at_equality(dtype: torch.dtype) -> None:
    logits = random_logits(3).to(dtype)
    losses, gradient = evaluate(forward_kl, logits, logits)
    assert torch.equal(losses, torch.zeros_like(losses))
    # The gradient is a difference of equal numbers, up to the last bit of fp32.
    assert gradient.abs().max() <= 4 * torch.finfo(losses.dtype).eps


def test_forward_kl_is_never_negative() -> None:
    rng = torch.Generator().manual_seed(4)
    for scale in (1e-6, 1e-3, 1.0, 20.0):
        teacher = torch.randn(500, V, generator=rng, dtype=torch.float64)
        student = teacher + scale * torch.randn(500, V, generator=rng, dtype=torch.float64)
        losses = forward_kl(student, teacher).values
        assert losses.min() >= -1e-15
        assert losses.max() > 0


@pytest.mark.parametrize("shift", [-40.0, 7.5, 1e3])
def test_losses_ignore_a_shift_of_all_logits(shift: float) -> None:
    student, teacher, tokens = random_logits(5), random_logits(6), random_tokens(7)
    plain = forward_kl(student, teacher).values
    assert torch.allclose(forward_kl(student + shift, teacher).values, plain, rtol=1e-10)
    assert torch.allclose(forward_kl(student, teacher - shift).values, plain, rtol=1e-10)
    assert torch.allclose(
        cross_entropy(student + shift, tokens).values,
        cross_entropy(student, tokens).values,
        rtol=1e-10,
    )


def test_tokens_that_the_teacher_excludes_cost_nothing() -> None:
    student, teacher = random_logits(8), random_logits(9)
    teacher[:, ::3] = -torch.inf
    teacher[0, 1:] = -torch.inf  # one token left
    teacher[0, 0] = 2.0
    losses, gradient = evaluate(forward_kl, student, teacher)
    expected, expected_gradient = reference_kl(student, teacher)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    assert losses[0] == pytest.approx(-np.log(probabilities(student)[0, 0]), rel=1e-12)


def test_a_token_that_both_exclude_leaves_no_nan() -> None:
    student, teacher = random_logits(10), random_logits(11)
    student[:, 4:9] = teacher[:, 4:9] = -torch.inf
    losses, gradient = evaluate(forward_kl, student, teacher)
    expected, expected_gradient = reference_kl(student, teacher)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    assert (gradient[:, 4:9] == 0).all()


def test_a_token_that_only_the_student_excludes_costs_infinity() -> None:
    student, teacher = random_logits(12), random_logits(13)
    student[2, 5] = -torch.inf
    losses = forward_kl(student, teacher).values
    assert losses[2] == torch.inf
    assert losses[torch.arange(N) != 2].isfinite().all()


def test_a_token_that_the_teacher_finds_impossible_in_float32_leaves_no_nan() -> None:
    teacher = torch.tensor([[0.0, -200.0, 0.0]])  # exp(-200) is 0 in float32
    student = torch.tensor([[0.0, -torch.inf, 0.0]])
    losses, gradient = evaluate(forward_kl, student, teacher)
    assert losses.item() == pytest.approx(0.0, abs=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_half_precision_logits_are_evaluated_in_float32(name: str, dtype: torch.dtype) -> None:
    # The truth is the reference on the rounded logits; the naive path stays in their dtype.
    student, teacher = random_logits(14).to(dtype), random_logits(15).to(dtype)
    tokens = random_tokens(16)
    if name == "forward_kl":
        losses, gradient = evaluate(forward_kl, student, teacher)
        expected, expected_gradient = reference_kl(student, teacher)
        log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
        naive = (log_t.exp() * (log_t - log_s)).sum(-1)
    else:
        losses, gradient = evaluate(cross_entropy, student, tokens)
        expected, expected_gradient = reference_ce(student, tokens)
        naive = -student.log_softmax(-1)[torch.arange(N), tokens]

    error = np.abs(losses.double().numpy() - expected).max()
    naive_error = np.abs(naive.double().numpy() - expected).max()
    assert losses.dtype == torch.float32
    assert error < naive_error / 20, f"error {error:.1e}, in {dtype} {naive_error:.1e}"
    assert gradient.dtype == torch.float32
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_a_teacher_in_another_precision_is_compared_in_float32() -> None:
    student, teacher = random_logits(17).float(), random_logits(18).bfloat16()
    losses = forward_kl(student, teacher).values
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses, reference_kl(student, teacher)[0], rtol=1e-5)
