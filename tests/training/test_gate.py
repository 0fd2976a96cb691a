"""Gated losses inside training: `speckd` and a gate on other sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axolotl_skd.losses import gates
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import (
    base_config,
    largest_difference,
    run_training,
    validation_set,
    weights,
)

# Two random models agree rarely.
GATES = {
    "top_k": {"rule": "top_k", "top_k": 150},
    "speculative": {"rule": "speculative", "top_k": 4},
}


def train(
    pair: Path, output_dir: Path, method: str, gate: dict[str, Any] | None, **keys: Any
) -> DistillationTrainer:
    config = base_config(pair, method=method, max_steps=2, **keys)
    if gate is not None:
        config["distillation"]["gate"] = gate
    return run_training(config, output_dir)


def lines(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("rule", ["top_k", "speculative"])
def test_a_reject_weight_of_1_is_supervised_kd(pair: Path, tmp_path: Path, rule: str) -> None:
    gated = train(pair, tmp_path / "gated", "speckd", {**GATES[rule], "reject_weight": 1})
    plain = train(pair, tmp_path / "plain", "supervised_kd", None)
    assert largest_difference(weights(gated), weights(plain)) == 0
    assert all(0 < line["gate/token_acceptance_rate"] < 1 for line in lines(gated))
    assert not any("gate/token_acceptance_rate" in line for line in lines(plain))


@pytest.mark.parametrize(("method", "rule"), [("speckd", "top_k"), ("skd", "speculative")])
def test_rejected_tokens_are_masked_out(pair: Path, tmp_path: Path, method: str, rule: str) -> None:
    gated = train(pair, tmp_path / "gated", method, GATES[rule])
    plain = "supervised_kd" if method == "speckd" else method
    ungated = train(pair, tmp_path / "plain", plain, None)
    for line, other in zip(lines(gated), lines(ungated), strict=True):
        assert 0 < line["gate/token_acceptance_rate"] < 1
        assert line["grad_norm"] > 0
        assert line["loss"] < other["loss"]  # fewer tokens in the same mean


def test_verdicts_do_not_depend_on_how_rows_are_batched(pair: Path, tmp_path: Path) -> None:
    """The gate's draws are keyed like the samples: 1 x 4 and 4 x 1 rows give the same rate."""
    rates = [
        lines(
            train(
                pair,
                tmp_path / str(size),
                "speckd",
                GATES["speculative"],
                micro_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
        )[0]["gate/token_acceptance_rate"]
        for size in (4, 1)
    ]
    assert rates[0] == rates[1]


def test_validation_is_gated_by_the_same_draws_each_time(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a student that does not move has one `eval_loss`."""
    seen = []
    rule = gates.accept_speculative

    def watched(*args: Any, **keys: Any) -> Any:
        seen.append(rule(*args, **keys))
        return seen[-1]

    monkeypatch.setattr(gates, "accept_speculative", watched)
    trainer = train(
        pair,
        tmp_path,
        "speckd",
        {**GATES["speculative"], "reject_weight": 0.5},
        learning_rate=1e-12,
        **{**validation_set(pair), "eval_steps": 1},
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) >= 2 and max(losses) - min(losses) < 1e-6
    assert any(not verdicts.all() for verdicts in seen)
