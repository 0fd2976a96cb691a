"""Resuming: a run stopped at a checkpoint and continued equals the uninterrupted one, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.harness import base_config, largest_difference, run_training, weights


@pytest.mark.parametrize("method", ["skd", "supervised_kd"])
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(2, id="inside an epoch, then over its end"),
        pytest.param(3, id="at the end of an epoch"),
    ],
)
def test_resume_is_exact(pair: Path, tmp_path: Path, where: int, method: str) -> None:
    """10 rows in batches of 4: an epoch has 3 steps; 6 steps are two epochs."""
    config = base_config(
        pair,
        method=method,
        max_steps=6,
        save_strategy="steps",
        save_steps=where,
        save_total_limit=9,
    )
    config["lr_scheduler"] = "linear"
    through = run_training(config, tmp_path / "through")
    resumed = run_training(
        {
            **config,
            "resume_from_checkpoint": str(tmp_path / "through" / f"checkpoint-{where}"),
        },
        tmp_path / "resumed",
    )
    assert resumed.state.global_step == through.state.global_step == 6
    assert largest_difference(weights(through), weights(resumed)) == 0
    first = [line["step"] for line in resumed.state.log_history if "loss" in line]
    assert len(first) == 6  # the history of the checkpoint and the steps after it
