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
    """All rows at once, a few, one by one; never the states of more positions than is said."""
    runs = []
    for limit in (trainer_module.GIVEN_TOKENS, 100, 1):
        monkeypatch.setattr(trainer_module, "GIVEN_TOKENS", limit)
        shapes: list[tuple[int, int]] = []

        def watch(trainer: DistillationTrainer, shapes: list[Any] = shapes) -> None:
            states = trainer.distiller.teacher.hidden_states

            def hidden_states(ids: Any, mask: Any) -> Any:
                shapes.append(tuple(ids.shape))
                return states(ids, mask)

            trainer.distiller.teacher.hidden_states = hidden_states

        config = base_config(pair, method=method, max_steps=2, **SGD)
        runs.append(weights(run_training(config, tmp_path / str(limit), watch)))
        assert shapes and all(rows * width <= max(limit, width) for rows, width in shapes)
    assert largest_difference(runs[0], runs[1]) < 2e-6
    assert largest_difference(runs[0], runs[2]) < 2e-6
