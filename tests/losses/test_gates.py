"""Gates: verdicts against naive loops, gated losses against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from axolotl_skd.losses import fused
from axolotl_skd.losses.divergences import DIVERGENCES, forward_kl, get_divergence, reverse_kl
from axolotl_skd.losses.fused import fused_token_loss
from axolotl_skd.losses.gates import GATES, gated, get_gate
from axolotl_skd.losses.objective import Objective, Tokens
from tests.losses.reference import ALPHA, BETA, plain_divergence

N, V, H = 40, 17, 5


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = 2 * random(N, V, seed=1), 2 * random(N, V, seed=2)
UNIFORMS = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def naive_verdicts(rule: str, k: int) -> list[bool]:
    """Token by token in Python; the speculative rule by the probability of its complement."""
    verdicts = []
    rows = (STUDENT.tolist(), TEACHER.tolist(), UNIFORMS.tolist())
    for student, teacher, uniform in zip(*rows, strict=True):
        if rule == "top_k":
            best = max(range(V), key=lambda v: student[v])
            ranked = sorted(range(V), key=lambda v: -teacher[v])
            verdicts.append(best in ranked[:k])
            continue
        q = [math.exp(x) / sum(map(math.exp, student)) for x in student]
        p = [math.exp(x) / sum(map(math.exp, teacher)) for x in teacher]
        missed = sum(b * (1 - min(1, a / b)) for a, b in zip(p, q, strict=True))
        verdicts.append(uniform >= missed**k)
    return verdicts


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("rule", sorted(GATES))
def test_verdicts_are_those_of_a_loop_over_tokens(rule: str, k: int) -> None:
    verdicts = get_gate(rule, k)(STUDENT, TEACHER, UNIFORMS).tolist()
    assert verdicts == naive_verdicts(rule, k)
    assert 0 < sum(verdicts) < N


def test_tokens_tied_at_rank_k_pass() -> None:
    teacher = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    for best, expected in ((0, True), (1, True), (2, True), (3, False)):
        student = torch.nn.functional.one_hot(torch.tensor([best]), 4).float()
        assert get_gate("top_k", 2)(student, teacher, UNIFORMS[:1]).item() is expected


@pytest.mark.parametrize("k", [1, 3])
def test_the_speculative_rule_accepts_as_often_as_k_draws_do(k: int) -> None:
    """Against draws and ratio tests, as the rule is worded; Hoeffding, false alarm below 1e-9."""
    count = 20_000
    student, teacher = STUDENT[:1].expand(count, V), TEACHER[:1].expand(count, V)
    generator = torch.Generator().manual_seed(4)
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    ours = get_gate("speculative", k)(student, teacher, uniforms).double().mean()
    q, p = student[0].softmax(-1), teacher[0].softmax(-1)
    draws = torch.multinomial(q.expand(count, V), k, replacement=True, generator=generator)
    coins = torch.rand(count, k, generator=generator, dtype=torch.float64)
    theirs = (coins < (p / q)[draws]).any(dim=1).double().mean()
    assert abs(float(ours - theirs)) < 2 * math.sqrt(math.log(4 / 1e-9) / (2 * count))
    assert 0.1 < ours < 0.9


@pytest.mark.parametrize("rule", sorted(GATES))
def test_equal_models_pass_and_disjoint_ones_do_not(rule: str) -> None:
    gate = get_gate(rule, 1)
    assert gate(TEACHER, TEACHER, torch.full((N,), 0.001)).all()
    apart = torch.full((2, V), -torch.inf).double()
    apart[0, 3] = apart[1, 4] = 0.0
    assert not gate(apart[:1], apart[1:], torch.tensor([0.999])).any()


def run(objective: Objective, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, gradients of hidden states and of the head, verdicts."""
    head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(random(V, H, seed=5))
    hidden = random(N, H, seed=6).requires_grad_()
    tokens = Tokens(
        ids=torch.zeros(N, dtype=torch.long),
        from_data=torch.ones(N, dtype=torch.bool),
        uniforms=UNIFORMS,
        accepted=torch.zeros(N, dtype=torch.bool),
    )
    recipe = objective.recipe(tokens, lambda part: TEACHER[part])
    total, losses = fused_token_loss(hidden, head, head, *recipe, chunk)
    total.backward()
    return losses, hidden.grad, head.weight.grad, tokens.accepted


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("reject_weight", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("rule", sorted(GATES))
def test_gated_losses_are_their_definition(
    rule: str, reject_weight: float, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through chunks and blocks, in value and gradient; no gradient flows through the weights."""
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", 3 * V)
    named = get_divergence(divergence, beta=BETA, alpha=ALPHA, temperature=2.0)
    losses, *gradients, accepted = run(
        Objective(named, gate=get_gate(rule, 2), reject_weight=reject_weight), chunk=7
    )

    hidden = random(N, H, seed=6).requires_grad_()
    weight = random(V, H, seed=5).requires_grad_()
    logits = hidden @ weight.T
    verdicts = get_gate(rule, 2)(logits.detach(), TEACHER, UNIFORMS)
    assert torch.equal(accepted, verdicts) and 0 < int(verdicts.sum()) < N
    expected = plain_divergence(divergence, logits, TEACHER, 2.0) * (
        verdicts + reject_weight * (~verdicts).double()
    )
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-9, atol=1e-12)
    for got, reference in zip(gradients, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", sorted(GATES))
def test_a_reject_weight_of_1_is_no_gate_bit_for_bit(rule: str) -> None:
    plain = run(Objective(forward_kl), chunk=7)
    gate = run(Objective(forward_kl, gate=get_gate(rule, 2), reject_weight=1.0), chunk=7)
    assert all(map(torch.equal, plain[:3], gate[:3]))
    assert not torch.equal(plain[3], gate[3])


def test_a_masked_token_may_have_an_infinite_loss() -> None:
    """KL(q || p) is infinite where the teacher excludes what the student says."""
    student = torch.zeros(2, 3)
    student[:, 0] = 5.0
    teacher = torch.tensor([[-torch.inf, 1.0, 0.0], [2.0, 1.0, 0.0]])
    accepted = torch.zeros(2, dtype=torch.bool)
    loss = gated(reverse_kl, get_gate("top_k", 1), 0.0)(student, teacher, UNIFORMS[:2], accepted)
    assert accepted.tolist() == [False, True]
    assert loss.values[0] == 0 and loss.values[1] > 0
    assert (loss.gradient()[0] == 0).all() and loss.gradient()[1].isfinite().all()
