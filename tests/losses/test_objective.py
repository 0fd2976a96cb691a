"""Divergence, gate and cross-entropy together, through the fused loss, against float64 definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from axolotl_skd.losses import fused
from axolotl_skd.losses.divergences import DIVERGENCES, Divergence, forward_kl, get_divergence
from axolotl_skd.losses.fused import fused_token_loss
from axolotl_skd.losses.gates import get_gate
from axolotl_skd.losses.objective import Objective, Tokens
from tests.losses.reference import ALPHA, BETA, plain_cross_entropy, plain_divergence

N, V, H = 12, 9, 4
RNG = torch.Generator().manual_seed(11)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


TEACHER, HIDDEN, WEIGHT = random(N, V), random(N, H), random(V, H)
IDS = torch.randint(V, (N,), generator=RNG)
FROM_DATA = torch.arange(N) % 3 > 0


def tokens() -> Tokens:
    return Tokens(
        ids=IDS,
        from_data=FROM_DATA,
        uniforms=torch.zeros(N, dtype=torch.float64),
        accepted=torch.zeros(N, dtype=torch.bool),
    )


def run(objective: Objective, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradients of hidden states and of the head."""
    head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(WEIGHT)
    hidden = HIDDEN.clone().requires_grad_()
    teacher = None if objective.divergence is None else lambda part: TEACHER[part]
    recipe = objective.recipe(replace(tokens(), weights=weights), teacher)
    total, losses = fused_token_loss(hidden, head, head, *recipe, 5)
    total.backward()
    return losses, hidden.grad, head.weight.grad


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", 2 * V)


@pytest.mark.parametrize("gate", [None, "top_k"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.5), (0.3, 0.0), (0.25, 2.0)])
def test_the_objective_is_its_definition(
    kd_weight: float, ce_weight: float, divergence: str, gate: str | None
) -> None:
    """Cross-entropy on ground truth only, beside the gate rather than behind it."""
    objective = Objective(
        get_divergence(divergence, beta=BETA, alpha=ALPHA, temperature=2.0),
        gate=gate and get_gate(gate, 2),
        reject_weight=0.1,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
    )
    got = run(objective)
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    logits = hidden @ weight.T
    values = torch.ones(N, dtype=torch.float64)
    if gate:
        values[~get_gate(gate, 2)(logits.detach(), TEACHER, tokens().uniforms)] = 0.1
        assert 0 < int((values == 1).sum()) < N
    losses = kd_weight * values * plain_divergence(divergence, logits, TEACHER, 2.0)
    losses = losses + ce_weight * FROM_DATA * plain_cross_entropy(logits, IDS)
    losses.sum().backward()
    for ours, reference in zip(got, (losses.detach(), hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_without_a_divergence_every_token_is_learned() -> None:
    """The teacher's sequences of `seqkd` are the target there, rolled out or not."""
    losses, *_ = run(Objective(None))
    torch.testing.assert_close(losses, plain_cross_entropy(HIDDEN @ WEIGHT.T, IDS))


@pytest.mark.parametrize("divergence", [None, forward_kl])
def test_weights_multiply_values_and_gradients(divergence: Divergence | None) -> None:
    """A weight of zero takes a token out; the head's gradient is that of the weighted sum."""
    weights = torch.arange(N) / 4.0
    losses, hidden_gradient, head_gradient = run(Objective(divergence), weights)
    plain, plain_hidden, _ = run(Objective(divergence))
    torch.testing.assert_close(losses, weights * plain)
    torch.testing.assert_close(hidden_gradient, weights[:, None] * plain_hidden)
    hidden, weight = HIDDEN.clone(), WEIGHT.clone().requires_grad_()
    logits = hidden @ weight.T
    reference = plain_cross_entropy(logits, IDS)
    if divergence is not None:
        reference = plain_divergence("forward_kl", logits, TEACHER)
    (weights * reference).sum().backward()
    torch.testing.assert_close(head_gradient, weight.grad)


def test_every_setting_changes_the_result() -> None:
    settings = [{}, {"kd_weight": 0.5}, {"ce_weight": 0.5}, {"gate": get_gate("top_k", 1)}]
    results = [run(Objective(forward_kl, **setting))[1] for setting in settings]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))
