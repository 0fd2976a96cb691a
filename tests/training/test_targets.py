"""The teacher's forward over given rows goes in chunks of rows, which changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axolotl_skd import trainer as trainer_module
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import SGD, base_config, largest_difference, run_training, weights


@pytest.mark.parametrize("method", ["supervised_kd", "on_policy_kd", "mixed_skd"])
def test_chunks_of_rows_change_nothing(
    pair: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of 64 positions at a time; never the logits of a whole row of the batch."""
    runs = []
    for limit in (trainer_module.TEACHER_TOKENS, 150, 1):
        monkeypatch.setattr(trainer_module, "TEACHER_TOKENS", limit)
        rows: list[int] = []

        def watch(trainer: DistillationTrainer, rows: list[int] = rows) -> None:
            states = trainer.distiller.teacher.hidden_states

            def hidden_states(ids: Any, mask: Any) -> Any:
                rows.append(len(ids))
                assert ids.numel() <= max(limit, ids.shape[1])
                return states(ids, mask)

            trainer.distiller.teacher.hidden_states = hidden_states

        config = base_config(pair, method=method, max_steps=2, **SGD)
        runs.append(weights(run_training(config, tmp_path / str(limit), watch)))
        assert rows and max(rows) <= {150: 2, 1: 1}.get(limit, 4)
    assert largest_difference(runs[0], runs[1]) < 2e-6
    assert largest_difference(runs[0], runs[2]) < 2e-6
