"""Every key of acceptance, dynamic K and stop strings has its effect in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axolotl_skd.rollout.types import FinishReason, Rollout
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import base_config, largest_difference, run_training, weights


def train(
    pair: Path, folder: Path, rollout: dict[str, Any], **keys: Any
) -> tuple[DistillationTrainer, list[Rollout]]:
    rollouts: list[Rollout] = []

    def watch(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        sample = source._sample

        def watched(*args: Any) -> Rollout:
            rollouts.append(sample(*args))
            return rollouts[-1]

        source._sample = watched

    keys = {"max_steps": 2, **keys}
    return run_training(base_config(pair, rollout=rollout, **keys), folder, watch), rollouts


def log(trainer: DistillationTrainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if "loss" in line and key in line]


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [ids.tolist() for rollout in rollouts for ids in rollout.unpadded()]


WARM = {"teacher_temperature": 1.0, "student_temperature": 1.0, "student_top_p": 0.9}


def test_every_rule_and_switch_changes_the_rollouts(pair: Path, tmp_path: Path) -> None:
    """Two steps of each; all differ from SKD's own rule and from each other."""
    settings: list[dict[str, Any]] = [
        {},
        {"acceptance": "top_p", "teacher_top_k": 25, "acceptance_top_p": 0.5},
        {"acceptance": "top_p", "teacher_top_k": 25, "acceptance_top_p": 0.8},
        {"acceptance": "min_p", "teacher_top_k": 25, "acceptance_min_p": 0.5},
        {"acceptance": "min_p", "teacher_top_k": 25, "acceptance_min_p": 0.1},
        {"acceptance": "speculative", "teacher_top_k": 25},
        {"replacement": "argmax"},
        {"bonus_token": True, "teacher_top_k": 500},
    ]
    seen = []
    for i, keys in enumerate(settings):
        trainer, rollouts = train(pair, tmp_path / str(i), {**WARM, **keys})
        assert all(loss > 0 for loss in log(trainer, "loss"))
        assert tokens(rollouts) not in seen
        seen.append(tokens(rollouts))
        bonus = sum(int((r.proposed_ids[r.completion_mask] == -1).sum()) for r in rollouts)
        assert (bonus > 0) == keys.get("bonus_token", False)
        tested = keys.get("acceptance", "top_k") == "top_k"
        assert log(trainer, "skd/teacher_top_k") == (
            [keys.get("teacher_top_k", 20)] * 2 if tested else []
        )


def test_a_stop_string_ends_rows(pair: Path, tmp_path: Path) -> None:
    trainer, free = train(pair, tmp_path / "free", {"stop_token_ids": []})
    text = trainer.processing_class.decode
    letter = next(c for c in text(free[0].unpadded()[0][3:]) if c.isascii())
    _, stopped = train(
        pair, tmp_path / "stopped", {"stop_token_ids": [], "stop_strings": [letter]}, max_steps=1
    )
    num_ended = 0
    for before, after, reason in zip(
        free[0].unpadded(), stopped[0].unpadded(), stopped[0].finish_reasons, strict=True
    ):
        assert before[: len(after)].tolist() == after.tolist()
        ended = letter in text(after)
        assert letter not in text(after[:-1])
        assert ended or len(after) == len(before)
        assert not ended or reason == FinishReason.STOP
        num_ended += ended
    assert num_ended


def test_k_follows_its_schedule(pair: Path, tmp_path: Path) -> None:
    schedule = {"start": 40, "end": 4, "schedule": "linear"}
    trainer, scheduled = train(pair, tmp_path / "a", {"teacher_top_k": schedule}, max_steps=4)
    assert log(trainer, "skd/teacher_top_k") == [40, 31, 22, 13]
    # The first step is that of a constant K of 40.
    _, constant = train(pair, tmp_path / "b", {"teacher_top_k": 40}, max_steps=1)
    assert tokens(scheduled[:1]) == tokens(constant)


@pytest.mark.parametrize(("target", "direction"), [(0.0, -1), (1.0, 1)])
def test_k_is_steered_towards_its_target(
    pair: Path, tmp_path: Path, target: float, direction: int
) -> None:
    controlled = {"target_acceptance": target, "start": 30}
    trainer, _ = train(pair, tmp_path, {**WARM, "teacher_top_k": controlled}, max_steps=4)
    used, rates = log(trainer, "skd/teacher_top_k"), log(trainer, "skd/acceptance_rate")
    assert used[0] == 30
    assert used == sorted(used, reverse=direction < 0) and used[0] != used[-1]
    assert all(0 < rate < 1 for rate in rates)


def test_a_resumed_run_takes_the_same_k(pair: Path, tmp_path: Path) -> None:
    """Bit by bit, the weights included; a controller that began anew would take another."""
    config = base_config(
        pair,
        rollout={**WARM, "teacher_top_k": {"target_acceptance": 0.95, "start": 12}},
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=9,
    )
    through = run_training(config, tmp_path / "through")
    resumed = run_training(
        {**config, "resume_from_checkpoint": str(tmp_path / "through" / "checkpoint-3")},
        tmp_path / "resumed",
    )
    used = log(through, "skd/teacher_top_k")
    assert log(resumed, "skd/teacher_top_k") == used
    assert len(set(used)) > 2 and used[3] != 12
    assert largest_difference(weights(through), weights(resumed)) == 0
