"""Methods that mix rollouts with the data set's completions, inside training."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import base_config, largest_difference, run_training, weights


def shares(trainer: DistillationTrainer) -> dict[int, float]:
    """Share of rows that were rolled out, by step."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {line["step"]: line["rollout/share"] for line in lines}


def test_two_stage_switches_at_its_step_also_after_resuming(pair: Path, tmp_path: Path) -> None:
    config = base_config(
        pair,
        method="two_stage",
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=9,
    )
    config["distillation"]["switch_at"] = 0.5
    through = run_training(config, tmp_path / "through")
    assert shares(through) == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}
    for checkpoint in (2, 4):
        resumed = run_training(
            {
                **config,
                "resume_from_checkpoint": str(tmp_path / "through" / f"checkpoint-{checkpoint}"),
            },
            tmp_path / f"resumed{checkpoint}",
        )
        assert shares(resumed) == shares(through)
        assert largest_difference(weights(through), weights(resumed)) == 0


@pytest.mark.parametrize(("lmbda", "equal"), [(0.0, "supervised_kd"), (1.0, "on_policy_kd")])
def test_gkd_has_its_limits(pair: Path, tmp_path: Path, lmbda: float, equal: str) -> None:
    """lmbda = 0 is supervised, lmbda = 1 on-policy distillation with the same divergence."""
    runs = []
    for method in ("gkd", equal):
        config = base_config(pair, method=method, max_steps=2)
        config["distillation"] |= {"lmbda": lmbda, "loss": {"divergence": "jsd"}}
        runs.append(weights(run_training(config, tmp_path / method)))
    assert largest_difference(*runs) < 1e-6


def test_imitkd_is_gkd_with_a_fair_coin_and_forward_kl(pair: Path, tmp_path: Path) -> None:
    """That the coin is fair, within a bound on false alarms: tests/test_sources.py."""
    imitkd = run_training(base_config(pair, method="imitkd"), tmp_path / "imitkd")
    config = base_config(pair, method="gkd")
    config["distillation"] |= {"lmbda": 0.5, "loss": {"divergence": "forward_kl"}}
    gkd = run_training(config, tmp_path / "gkd")
    assert largest_difference(weights(imitkd), weights(gkd)) == 0
    shares = [line["rollout/share"] for line in imitkd.state.log_history if "loss" in line]
    assert 0 < sum(shares) < len(shares)


def test_mixed_skd_of_everything_is_skd(pair: Path, tmp_path: Path) -> None:
    runs = []
    for method in ("mixed_skd", "skd"):
        config = base_config(pair, method=method, max_steps=2)
        config["distillation"]["lmbda"] = 1.0
        runs.append(weights(run_training(config, tmp_path / method)))
    assert largest_difference(*runs) == 0


def test_gkd_learns_the_jsd_unless_told_otherwise(pair: Path, tmp_path: Path) -> None:
    losses = []
    for loss in ({}, {"divergence": "jsd"}, {"divergence": "forward_kl"}):
        config = base_config(pair, method="gkd", max_steps=1)
        config["distillation"]["loss"] = {"jsd_beta": 0.5, **loss}
        trainer = run_training(config, tmp_path / str(len(losses)))
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1] != losses[2]
