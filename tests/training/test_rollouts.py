"""Rollouts inside training: of which weights, in which mode, and what is logged about them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_skd.rollout.types import Rollout
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import (
    SGD,
    base_config,
    largest_difference,
    run_training,
    save_model,
    validation_set,
    weights,
)


class RolloutWatch:
    """What each rollout saw: the student's weights and mode; and what came out."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.training: list[bool] = []
        self.rollouts: list[Rollout] = []
        self.after_step: list[dict[str, Tensor]] = [weights(trainer)]
        self.training_after: list[bool] = []
        source, model = trainer.distiller.source, trainer.model
        sample, step = source._sample, trainer.training_step

        def watched(*args: Any) -> Rollout:
            # The weights that the engine samples from, wherever it has them.
            state = sample.__self__.student.model.state_dict()
            self.weights.append({name: value.clone() for name, value in state.items()})
            self.training.append(model.training)
            self.rollouts.append(sample(*args))
            return self.rollouts[-1]

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self.training_after.append(model.training)
            return loss

        source._sample = watched
        trainer.training_step = training_step
        trainer.callback_handler.callbacks.insert(0, _AfterStep(self, trainer))


class _AfterStep:
    """A callback that keeps the weights after each optimizer step."""

    def __init__(self, watch: RolloutWatch, trainer: DistillationTrainer) -> None:
        self._watch, self._trainer = watch, trainer

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._watch.after_step.append(weights(self._trainer))


def watched_run(config: dict[str, Any], output_dir: Path) -> RolloutWatch:
    watches: list[RolloutWatch] = []
    run_training(config, output_dir, lambda trainer: watches.append(RolloutWatch(trainer)))
    return watches[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rollout_uses_the_weights_of_its_step(pair: Path, tmp_path: Path, workers: int) -> None:
    """Step n + 1 rolls out with the weights after step n, also when batches are prefetched."""
    watch = watched_run(
        base_config(
            pair, dataloader_num_workers=workers, gradient_accumulation_steps=2, micro_batch_size=2
        ),
        tmp_path,
    )
    assert len(watch.weights) == 4
    for step in range(4):
        assert largest_difference(watch.weights[step], watch.after_step[step]) == 0
        assert largest_difference(watch.weights[step], watch.after_step[step + 1]) > 0


def test_dropout_is_off_while_sampling_and_on_while_training(pair: Path, tmp_path: Path) -> None:
    """The first rollout equals that of the same student without dropout; modes are restored."""
    (tmp_path / "folder").mkdir()
    for name in ("teacher", "train.jsonl"):
        (tmp_path / "folder" / name).symlink_to(pair / name)
    save_model(tmp_path / "folder" / "student", seed=0, tied=True, attention_dropout=0.5)
    with_dropout = watched_run(base_config(tmp_path / "folder", max_steps=2), tmp_path / "a")
    without = watched_run(base_config(pair, max_steps=2), tmp_path / "b")
    assert torch.equal(with_dropout.rollouts[0].completion_ids, without.rollouts[0].completion_ids)
    assert with_dropout.training[1] is False  # inside the sampler
    assert with_dropout.training_after == [True, True]
    # Dropout did act on the training forward, or this test would prove nothing.
    assert largest_difference(with_dropout.after_step[1], without.after_step[1]) > 1e-4


def test_draft_length_cannot_change_the_training(pair: Path, tmp_path: Path) -> None:
    runs = [
        watched_run(
            base_config(pair, rollout={"num_draft_tokens": drafts}, **SGD), tmp_path / str(drafts)
        )
        for drafts in (1, 4)
    ]
    for a, b in zip(runs[0].rollouts, runs[1].rollouts, strict=True):
        assert torch.equal(a.completion_ids, b.completion_ids)
        assert torch.equal(a.accepted_mask, b.accepted_mask)
    assert largest_difference(runs[0].after_step[-1], runs[1].after_step[-1]) < 1e-5


def test_skd_with_all_of_the_vocabulary_is_on_policy(pair: Path, tmp_path: Path) -> None:
    skd = watched_run(
        base_config(pair, rollout={"teacher_top_k": 512}, max_steps=2), tmp_path / "skd"
    )
    on_policy = watched_run(
        base_config(pair, method="on_policy_kd", max_steps=2), tmp_path / "on_policy"
    )
    for a, b in zip(skd.rollouts, on_policy.rollouts, strict=True):
        assert torch.equal(a.completion_ids, b.completion_ids)
    assert largest_difference(skd.after_step[-1], on_policy.after_step[-1]) < 2e-4


def test_the_seed_decides_the_rollouts(pair: Path, tmp_path: Path) -> None:
    """`distillation.seed` alone changes the tokens."""
    config = base_config(pair, max_steps=1)
    config["distillation"]["seed"] = 99
    other = watched_run(config, tmp_path / "a").rollouts[0]
    default = watched_run(base_config(pair, max_steps=1), tmp_path / "b").rollouts[0]
    assert not torch.equal(
        other.completion_ids[:, :1], default.completion_ids[:, :1]
    ) or not torch.equal(other.completion_lengths, default.completion_lengths)


def test_every_epoch_is_sampled_anew(pair: Path, tmp_path: Path) -> None:
    """With weights that never change, a row's completion still differs from epoch to epoch.

    10 rows in batches of 4: steps 1 to 3 are one epoch, 4 to 6 the next.
    """
    completions: list[dict[int, list[int]]] = [{}, {}]

    def watch(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        complete = source.complete

        def watched(batches: Any, epoch: int, progress: float) -> Any:
            assert epoch == trainer.state.global_step // 3
            assert progress == trainer.state.global_step / 6
            completed, metrics = complete(batches, epoch, progress)
            for batch in completed:
                for row, sample in enumerate(batch["sample_ids"].tolist()):
                    kept = batch["labels"][row] != -100
                    completions[epoch][sample] = batch["labels"][row][kept].tolist()
            return completed, metrics

        source.complete = watched

    wide = {"student_temperature": 2.0, "student_top_p": 1.0, "teacher_temperature": 2.0}
    config = base_config(pair, max_steps=6, learning_rate=1e-30, rollout=wide)
    run_training(config, tmp_path, watch)
    first, second = completions
    assert first.keys() == second.keys() and len(first) == 10
    assert sum(first[sample] != second[sample] for sample in first) >= 8


def test_log_lines(pair: Path, tmp_path: Path) -> None:
    """Every training line has the promised metrics and no perplexity of a divergence."""
    watches: list[RolloutWatch] = []
    trainer = run_training(
        base_config(pair, **validation_set(pair)),
        tmp_path,
        lambda trainer: watches.append(RolloutWatch(trainer)),
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line, rollout in zip(lines, watches[0].rollouts, strict=True):
        tokens = int(rollout.completion_mask.sum())
        assert line["rollout/length"] == pytest.approx(tokens / len(rollout.completion_mask))
        assert line["skd/acceptance_rate"] == pytest.approx(
            int(rollout.accepted_mask.sum()) / tokens
        )
        assert line["rollout/draft_efficiency"] == pytest.approx(
            tokens / int(rollout.num_proposed.sum())
        )
        assert 0 <= line["rollout/truncated_share"] <= 1
        assert line["rollout/seconds"] > 0
        assert line["rollout/tokens_per_second"] == pytest.approx(tokens / line["rollout/seconds"])
        assert math.isfinite(line["loss"])
    assert not any("ppl" in key for line in trainer.state.log_history for key in line)
    assert any("eval_loss" in line for line in trainer.state.log_history)


def test_perplexity_stays_where_it_means_something(pair: Path, tmp_path: Path) -> None:
    trainer = run_training(base_config(pair, method="sft", max_steps=1), tmp_path)
    assert "ppl" in next(line for line in trainer.state.log_history if "loss" in line)


def test_checkpoints_hold_the_student_alone(pair: Path, tmp_path: Path) -> None:
    trainer = run_training(
        base_config(pair, max_steps=2, save_strategy="steps", save_steps=2), tmp_path
    )
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trainer.model.state_dict()) - {"lm_head.weight"}  # tied
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    teacher = trainer.distiller.teacher.model
    assert not trained & {id(p) for p in teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
