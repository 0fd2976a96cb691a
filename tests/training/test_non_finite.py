"""Rows for which the teacher gives no numbers: left out on request, named and counted."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.rollout.sampling import NonFiniteLogitsError
from axolotl_skd.trainer import DistillationTrainer, NonFiniteLossError
from tests.training.harness import (
    SGD,
    base_config,
    largest_difference,
    run_training,
    save_rows,
    weights,
)


def skipping(pair: Path, folder: Path, method: str, **keys: Any) -> dict[str, Any]:
    """Ten rows, one of them with a rare character."""
    config = base_config(pair, method=method, **{**SGD, **keys})
    config["distillation"]["on_non_finite"] = "skip"
    rows = save_rows(folder / "train.jsonl", 10)
    rows.write_text(rows.read_text().replace("What is 4 ", "What is# 4 "))
    config["datasets"][0]["path"] = str(rows)
    config["dataset_prepared_path"] = str(folder / "prepared")
    return config


class Poison:
    """The teacher does not know a token that only one row has, in its prompt."""

    def __init__(self) -> None:
        self.token = self.sample = self.visits = 0

    def __call__(self, trainer: DistillationTrainer) -> None:
        batches = [trainer.train_data_collator([row]) for row in trainer.train_dataset]
        rows = [one["input_ids"][0, : int(one["prompt_lengths"])].tolist() for one in batches]
        counts = Counter(token for row in rows for token in set(row))
        for one, row in zip(batches, rows, strict=True):
            for token in row:
                if counts[token] == 1:
                    self.token, self.sample = token, int(one["sample_ids"])
        assert self.token, "no token is in one prompt alone"
        with torch.no_grad():
            self.spoil(trainer)
        complete = trainer.distiller.source.complete

        def watched(batches: Any, *args: Any) -> Any:
            completed, metrics = complete(batches, *args)
            hits = [batch["sample_ids"] == self.sample for batch in completed]
            self.visits += int(torch.cat(hits).sum())
            return [self.seen(*one) for one in zip(completed, hits, strict=True)], metrics

        trainer.distiller.source.complete = watched

    def spoil(self, trainer: DistillationTrainer) -> None:
        trainer.distiller.teacher.model.model.embed_tokens.weight[self.token] = float("nan")

    def seen(self, batch: dict[str, Any], hit: torch.Tensor) -> dict[str, Any]:
        return batch


class OneBadState(Poison):
    """The teacher's state of the row's last token alone is spoilt; the whole row is to be left out."""

    def spoil(self, trainer: DistillationTrainer) -> None:
        teacher_hidden = trainer._teacher_hidden

        def spoilt(inputs: Any, predicted: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            hidden = teacher_hidden(inputs, predicted, rows)
            hit = (inputs["sample_ids"] == self.sample)[predicted.nonzero()[:, 0]]
            hidden[hit.nonzero()[-1:, 0]] = float("nan")
            return hidden

        trainer._teacher_hidden = spoilt


class Antidote(Poison):
    """Nothing is spoilt, but the row is taken out by hand before any token is counted."""

    def spoil(self, trainer: DistillationTrainer) -> None:
        pass

    def seen(self, batch: dict[str, Any], hit: torch.Tensor) -> dict[str, Any]:
        return {**batch, "labels": batch["labels"].masked_fill(hit[:, None], -100)}


def skipped_rows(trainer: DistillationTrainer) -> float:
    return sum(line["loss/skipped_rows"] for line in trainer.state.log_history if "loss" in line)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_a_row_of_the_data_is_left_out_of_the_loss(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, normalize: str
) -> None:
    config = skipping(pair, tmp_path, "supervised_kd", max_steps=6)
    config["distillation"]["loss"] = {"normalize": normalize}
    # A micro-batch may be lost altogether.
    config |= {"micro_batch_size": 1, "gradient_accumulation_steps": 4}
    poison = OneBadState()
    with caplog.at_level(logging.WARNING, "axolotl_skd.trainer"):
        trainer = run_training(config, tmp_path / "poisoned", poison)
    assert poison.visits == skipped_rows(trainer) == 2  # once an epoch
    assert caplog.text.count(f"are not finite: sample(s) {poison.sample} (") == 2
    expected = run_training(config, tmp_path / "by_hand", Antidote())
    assert largest_difference(weights(trainer), weights(expected)) < 1e-6
    losses = [
        [line["loss"] for line in run.state.log_history if "loss" in line]
        for run in (trainer, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    if normalize == "token":
        untouched = run_training(config, tmp_path / "untouched")
        assert skipped_rows(untouched) == 0
        assert largest_difference(weights(trainer), weights(untouched)) > 1e-4


def test_a_row_that_cannot_be_rolled_out_is_left_out(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may sample the token, and are then left out as well."""
    poison = Poison()
    with caplog.at_level(logging.WARNING, "axolotl_skd"):
        trainer = run_training(skipping(pair, tmp_path, "skd", max_steps=3), tmp_path, poison)
    assert f"{poison.sample}" in caplog.text
    assert skipped_rows(trainer) >= 1
    assert all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize(
    ("whose", "method"),
    [("student", "supervised_kd"), ("teacher", "supervised_kd"), ("teacher", "skd")],
)
def test_what_would_leave_nothing_stops(
    pair: Path, tmp_path: Path, method: str, whose: str
) -> None:
    """A diverged student is never skipped, nor is a whole window."""
    before: dict[str, torch.Tensor] = {}
    trainers: list[DistillationTrainer] = []

    def poison(trainer: DistillationTrainer) -> None:
        trainers.append(trainer)
        with torch.no_grad():
            getattr(trainer.distiller, whose).model.model.norm.weight.fill_(float("nan"))
        before.update(weights(trainer))

    with pytest.raises(
        (NonFiniteLogitsError, NonFiniteLossError), match=r"sample\(s\)|was skipped"
    ):
        run_training(skipping(pair, tmp_path, method), tmp_path, poison)
    after = weights(trainers[0])
    assert all(torch.equal(before[k], after[k]) or before[k].isnan().any() for k in before)
