"""`kd_weight` and `ce_weight` inside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import base_config, run_training
from tests.training.test_loss import TOLERANCE, completion_logprobs, row_ids

KD, CE = 0.25, 2.0


@pytest.mark.parametrize("method", ["supervised_kd", "mixed_skd"])
def test_cross_entropy_joins_where_there_is_ground_truth(
    pair: Path, tmp_path: Path, method: str
) -> None:
    """Against whole forwards in float64: both kinds of rows, each by its own rule."""
    found: dict[str, float] = {}

    def watch(trainer: DistillationTrainer) -> None:
        inner = trainer.compute_loss

        @torch.no_grad()
        def reference(student: Any, batch: dict[str, Any]) -> float:
            total, tokens = 0.0, 0
            sampled = batch.get("rolled_out", torch.zeros(len(batch["input_ids"])).bool())
            found["sampled"], found["rows"] = int(sampled.sum()), len(sampled)
            for row in range(len(batch["input_ids"])):
                ids, length = row_ids(batch, row), int(batch["prompt_lengths"][row])
                mine = completion_logprobs(student, ids, length)
                theirs = completion_logprobs(trainer.distiller.teacher.model, ids, length)
                total += KD * float((theirs.exp() * (theirs - mine)).sum())
                if not sampled[row]:
                    total -= CE * float(mine[torch.arange(len(mine)), ids[length:]].sum())
                tokens += len(mine)
            return total / tokens

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found["expected"] = reference(model, dict(inputs))
            found["got"] = float(inner(model, inputs, *args, **kwargs).detach())
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    config = base_config(pair, method=method, max_steps=1)
    config["distillation"]["loss"] = {"kd_weight": KD, "ce_weight": CE}
    run_training(config, tmp_path, watch)
    assert found["got"] == pytest.approx(found["expected"], abs=TOLERANCE)
    if method == "mixed_skd":
        assert 0 < found["sampled"] < found["rows"]
