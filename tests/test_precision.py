"""Float32 masters of what trains, and which updates 16-bit weights lose."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from axolotl_skd.precision import lost_share, raise_to_float32, warn_of_lost_updates


def layers(dtype: torch.dtype, std: float = 0.02) -> nn.Module:
    """Three tensors, of which the last is frozen."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3)).to(dtype)
    for layer in model:
        nn.init.normal_(layer.weight, std=std)
    model[2].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_what_trains_is_raised_and_keeps_its_value(dtype: torch.dtype) -> None:
    model = layers(dtype)
    before = [layer.weight.detach().clone() for layer in model]
    parameters = list(model.parameters())
    assert raise_to_float32(model) == 2 * 64 * 64
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.float32, dtype]
    assert all(
        torch.equal(layer.weight, old.to(layer.weight.dtype))
        for layer, old in zip(model, before, strict=True)
    )
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))  # ties hold
    assert raise_to_float32(model) == 0


def test_quantised_weights_are_left_alone() -> None:
    model = nn.Module()
    model.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert raise_to_float32(model) == 0
    assert model.packed.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", [1e-6, 1e-5, 1e-4, 1e-3])
def test_the_share_of_lost_updates_is_that_of_real_ones(dtype: torch.dtype, update: float) -> None:
    model = layers(dtype)
    step = torch.optim.SGD(model.parameters(), lr=update)
    before = [layer.weight.detach().clone() for layer in model[:2]]
    share = lost_share(model, update)
    for layer in model[:2]:
        layer.weight.grad = torch.ones_like(layer.weight)
    step.step()
    same = [
        (layer.weight == old).float().mean() for layer, old in zip(model[:2], before, strict=True)
    ]
    # SGD rounds the update itself first, which moves a few ties.
    assert share == pytest.approx(float(sum(same)) / 2, abs=0.02)


def test_finer_or_frozen_weights_lose_nothing() -> None:
    assert lost_share(layers(torch.float32), 1e-9) == 0
    assert lost_share(layers(torch.bfloat16).requires_grad_(False), 1e-9) == 0


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "warns"),
    [
        (torch.bfloat16, 1e-5, True),
        (torch.bfloat16, 1e-3, False),
        (torch.float32, 1e-9, False),
    ],
)
def test_the_warning_names_the_key_and_the_share(
    dtype: torch.dtype, learning_rate: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_lost_updates(layers(dtype), learning_rate)
    assert bool(caplog.records) == warns
    if warns:
        message = caplog.records[0].getMessage()
        assert "distillation.fp32_master_weights: true" in message
        assert "learning_rate = 1e-05" in message and "%" in message
