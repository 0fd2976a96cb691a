"""Each of the six divergences equals its definition, in value and gradient, with its properties.

The reference is numpy in float64 on probabilities; its gradient is closed: for D(q) = sum_v f(q_v),
d D / d logits = q (g - sum_u q_u g_u), g = d D / d q, so no automatic differentiation is trusted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_skd.losses.divergences import DIVERGENCES, Divergence, cross_entropy, get_divergence
from axolotl_skd.losses.fused import fused_token_loss
from tests.losses.reference import ALPHA, BETA, plain_divergence

N, V, H = 9, 37, 8


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * np.log(a / b), axis=-1)


def value(name: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p teacher, q student, both [N, V] of positive probabilities."""
    m = BETA * p + (1 - BETA) * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": BETA * kl(p, m) + (1 - BETA) * kl(q, m),
        "skew_kl": kl(p, ALPHA * p + (1 - ALPHA) * q),
        "skew_reverse_kl": kl(q, (1 - ALPHA) * p + ALPHA * q),
        "tvd": 0.5 * np.sum(np.abs(p - q), axis=-1),
    }[name]


def slope(name: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d value / d q, up to a constant per row, which the softmax takes out."""
    m = BETA * p + (1 - BETA) * q
    s, r = ALPHA * p + (1 - ALPHA) * q, (1 - ALPHA) * p + ALPHA * q
    return {
        "forward_kl": -p / q,
        "reverse_kl": np.log(q / p),
        "jsd": (1 - BETA) * np.log(q / m),
        "skew_kl": -(1 - ALPHA) * p / s,
        "skew_reverse_kl": np.log(q / r) - ALPHA * q / r,
        "tvd": 0.5 * np.sign(q - p),
    }[name]


def gradient(name: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    g = slope(name, p, q)
    return q * (g - np.sum(q * g, axis=-1, keepdims=True))


def softmax(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(logits.double().numpy() / temperature)
    return weights / weights.sum(axis=-1, keepdims=True)


def random_logits(seed: int, scale: float = 2.0, width: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, width, generator=generator, dtype=torch.float64)


def divergence(name: str, temperature: float = 1.0) -> Divergence:
    return get_divergence(name, beta=BETA, alpha=ALPHA, temperature=temperature)


def evaluate(
    name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    loss = divergence(name, temperature)(student, teacher)
    return loss.values, loss.gradient()


@pytest.fixture(params=sorted(DIVERGENCES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
def test_definition(name: str, scale: float, temperature: float) -> None:
    """At a temperature the chain rule gives one factor 1 / T and no other."""
    student, teacher = random_logits(0, scale), random_logits(1, scale)
    losses, got = evaluate(name, student, teacher, temperature)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    np.testing.assert_allclose(losses, value(name, p, q), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(got, gradient(name, p, q) / temperature, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_at_equality(name: str, dtype: torch.dtype) -> None:
    logits = random_logits(3).to(dtype)
    losses, got = evaluate(name, logits, logits)
    precision = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    assert losses.abs().max() <= 20 * precision  # sums of V terms that cancel
    assert got.abs().max() <= 20 * max(precision, torch.finfo(dtype).eps * 1e-3)


def test_never_negative(name: str) -> None:
    for seed in range(50):
        student = random_logits(seed, 0.01 if seed % 2 else 6.0)
        loss = divergence(name)(student.float(), random_logits(seed + 100, 6.0).float())
        assert loss.values.min() >= -1e-6  # float32 rounding of sums of V terms


def test_bounded_ones_are_bounded() -> None:
    """TVD by 1, JSD by the entropy of its weights."""
    student, teacher = random_logits(5, 50.0), random_logits(6, 50.0)
    assert divergence("tvd")(student, teacher).values.max() <= 1
    bound = -(BETA * np.log(BETA) + (1 - BETA) * np.log(1 - BETA))
    assert divergence("jsd")(student, teacher).values.max() <= bound + 1e-12


def test_tokens_that_both_exclude_change_nothing(name: str) -> None:
    """-inf on both sides: no NaN in value or gradient, the rest as without those tokens."""
    student, teacher = random_logits(7), random_logits(8)
    losses, got = evaluate(name, student, teacher)
    wall = torch.full((N, 4), -torch.inf, dtype=torch.float64)
    walled, walled_gradient = evaluate(
        name, torch.cat([student, wall], 1), torch.cat([teacher, wall], 1)
    )
    torch.testing.assert_close(walled, losses)
    torch.testing.assert_close(walled_gradient[:, :V], got)
    assert (walled_gradient[:, V:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_tokens_that_one_excludes_are_a_limit(name: str, who: str, dtype: torch.dtype) -> None:
    """-inf on one side gives what a probability of e^-600 gives, in value and gradient."""
    logits = {"student": random_logits(7), "teacher": random_logits(8)}
    almost = {key: value.clone() for key, value in logits.items()}
    # The last of them keeps one token only.
    for rows, columns in ((slice(0, 4), slice(0, V, 3)), (slice(4, 5), slice(1, V))):
        logits[who][rows, columns] = -torch.inf
        almost[who][rows, columns] = -600.0
    p, q = softmax(almost["teacher"]), softmax(almost["student"])
    losses, got = evaluate(name, logits["student"].to(dtype), logits["teacher"].to(dtype))
    infinite = (name, who) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    close = dict(rtol=1e-8, atol=1e-12) if dtype is torch.float64 else dict(rtol=2e-5, atol=2e-6)
    finite = slice(5, N) if infinite else slice(0, N)
    assert (losses[:5] == torch.inf).all() or not infinite
    np.testing.assert_allclose(losses[finite], value(name, p, q)[finite], **close)
    np.testing.assert_allclose(got[finite], gradient(name, p, q)[finite], **close)


@pytest.mark.parametrize("scale", [1e3, 3e4, 1e30])
def test_extreme_logits_leave_no_nan(name: str, scale: float) -> None:
    """One-hot distributions in float32: zero where they agree, the most there is where not."""
    student, teacher = (random_logits(seed, scale).float() for seed in (9, 10))
    most = {"tvd": 1.0, "jsd": -(BETA * np.log(BETA) + (1 - BETA) * np.log(1 - BETA))}
    most["skew_kl"] = most["skew_reverse_kl"] = -np.log(ALPHA)
    losses, got = evaluate(name, student, teacher)
    agree = student.argmax(1) == teacher.argmax(1)
    assert losses.isfinite().all() and got.isfinite().all()
    assert losses[~agree].min() > 0.5
    if name in most:
        np.testing.assert_allclose(losses[~agree], most[name], rtol=1e-5)
    same, none = evaluate(name, student, student)
    assert (same == 0).all() or name in ("jsd", "skew_kl", "skew_reverse_kl")
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    np.testing.assert_allclose(none, 0.0, atol=1e-6)


@pytest.mark.parametrize("who", [0, 1])
def test_no_number_stays_no_number(name: str, who: int) -> None:
    """What is masked is probability zero, never a NaN: the trainer must see it and stop."""
    logits = [random_logits(7), random_logits(8)]
    logits[who][2, 5] = torch.nan
    losses = divergence(name)(*logits).values
    assert losses.isnan().tolist() == [row == 2 for row in range(N)]
    assert cross_entropy(logits[who], torch.zeros(N, dtype=torch.int64)).values[2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_evaluated_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = random_logits(9).to(dtype), random_logits(10).to(dtype)
    losses, got = evaluate(name, student, teacher, 2.0)
    assert losses.dtype == got.dtype == torch.float32
    expected, expected_gradient = evaluate(name, student.float(), teacher.float(), 2.0)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    torch.testing.assert_close(got, expected_gradient, rtol=0, atol=0)


def test_autocast_does_not_reach_the_loss(name: str) -> None:
    student, teacher = random_logits(9).float(), random_logits(10).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = evaluate(name, student, teacher)
    for got, expected in zip(under, evaluate(name, student, teacher), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, N])
def test_fused_equals_unfused(name: str, chunk: int, temperature: float) -> None:
    """Through a head in chunks: values and gradients of hidden states and weights, in float64."""
    hidden, teacher = random_logits(11, width=H), random_logits(12)
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        head = torch.nn.Linear(H, V).double()
        leaf = hidden.clone().requires_grad_()
        if fused:
            loss = divergence(name, temperature)
            total, _ = fused_token_loss(
                leaf, head, head, loss, lambda part: (teacher[part],), chunk
            )
        else:
            total = plain_divergence(name, head(leaf), teacher, temperature).sum()
        total.backward()
        results.append((total.detach(), leaf.grad, head.weight.grad, head.bias.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_every_knob_matters() -> None:
    student, teacher = random_logits(13), random_logits(14)

    def losses(name: str, beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0):
        loss = get_divergence(name, beta=beta, alpha=alpha, temperature=temperature)
        return loss(student, teacher).values

    assert not torch.allclose(losses("jsd"), losses("jsd", beta=0.4))
    assert not torch.allclose(losses("skew_kl"), losses("skew_kl", alpha=0.2))
    assert not torch.allclose(losses("skew_reverse_kl"), losses("skew_reverse_kl", alpha=0.2))
    for name in DIVERGENCES:
        assert not torch.allclose(losses(name), losses(name, temperature=2.0))


def test_jsd_near_its_ends_is_small_and_not_a_kl() -> None:
    """Why beta = 0 and 1 are no settings of `jsd`: the limit is zero, others jump to a KL there."""
    student, teacher = random_logits(15), random_logits(16)
    near = get_divergence("jsd", beta=1e-3, alpha=0.1, temperature=1.0)(student, teacher).values
    assert (near < 0.01 * divergence("forward_kl")(student, teacher).values).all()
