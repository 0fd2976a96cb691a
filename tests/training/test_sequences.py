"""Options of whole sequences: how the loss is normalised, several rollouts, truncated ones masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import (
    SGD,
    base_config,
    largest_difference,
    run_training,
    validation_set,
    weights,
)
from tests.training.test_loss import TOLERANCE, LossWatch


class RowWatch(LossWatch):
    """Keeps (sum, tokens) per row that is trained on, and the batches of evaluation."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.rows: list[tuple[float, int]] = []
        self.evaluated: list[dict[str, Any]] = []
        super().__init__(trainer)
        step = trainer.prediction_step

        def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.evaluated.append(dict(inputs))
            return step(model, inputs, *args, **kwargs)

        trainer.prediction_step = prediction_step

    def sums(self, trainer: Any, student: Any, batch: dict[str, Any]) -> list[tuple[float, int]]:
        rows = super().sums(trainer, student, batch)
        trained = (batch["labels"] != -100).any(dim=1).tolist()
        kept = [row for row, on in zip(rows, trained, strict=True) if on]
        self.rows += kept
        return kept


def train(
    pair: Path, output_dir: Path, loss: dict[str, Any] | None = None, **keys: Any
) -> tuple[DistillationTrainer, RowWatch]:
    watches: list[RowWatch] = []
    config = base_config(pair, **{**SGD, "max_steps": 2, **keys})
    config["distillation"]["loss"] = loss or {}
    trainer = run_training(config, output_dir, lambda trainer: watches.append(RowWatch(trainer)))
    return trainer, watches[0]


def logged(trainer: DistillationTrainer, key: str = "loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def sequence_mean(rows: list[tuple[float, int]]) -> float:
    return sum(total / tokens for total, tokens in rows) / len(rows)


def token_mean(rows: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in rows) / sum(tokens for _, tokens in rows)


SEQUENCE = {"normalize": "sequence"}


@pytest.mark.parametrize("method", ["skd", "sft"])
def test_sequences_count_alike_however_they_are_batched(
    pair: Path, tmp_path: Path, method: str
) -> None:
    """4 x 1 rows accumulated equal 1 x 4 rows and the mean over rows of their token means."""
    runs = []
    for size in (4, 1):
        trainer, watch = train(
            pair,
            tmp_path / str(size),
            SEQUENCE,
            method=method,
            micro_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        for step, loss in enumerate(logged(trainer)):
            rows = watch.rows[4 * step : 4 * step + 4]
            assert loss == pytest.approx(sequence_mean(rows), abs=1e-4)
        assert abs(sequence_mean(watch.rows[:4]) - token_mean(watch.rows[:4])) > 1e-3
        runs.append(weights(trainer))
    assert largest_difference(*runs) < 2e-6


def test_the_gradient_is_that_of_the_mean_over_sequences(pair: Path, tmp_path: Path) -> None:
    """Rows of one step, one by one: the step with all is the mean of their own steps."""
    start: dict[str, torch.Tensor] = {}
    config = base_config(
        pair, method="sft", max_steps=1, max_grad_norm=1e9, micro_batch_size=2, **SGD
    )
    config["distillation"]["loss"] = SEQUENCE
    batches: list[dict[str, Any]] = []

    def watch(trainer: DistillationTrainer) -> None:
        start.update(weights(trainer))
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(dict(inputs))
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    trainer = run_training(config, tmp_path, watch)
    end = weights(trainer)
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.load_state_dict(start)
    student.zero_grad()
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    logprobs = student(**inputs).logits[:, :-1].double().log_softmax(-1)
    labels = batches[0]["labels"][:, 1:]
    picked = -logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    means = [row[own != -100].mean() for row, own in zip(picked, labels, strict=True)]
    (sum(means) / len(means)).backward()
    for name, parameter in student.named_parameters():
        expected = start[name] - SGD["learning_rate"] * parameter.grad
        torch.testing.assert_close(end[name], expected, rtol=0, atol=2e-6)


def test_validation_is_normalised_alike(pair: Path, tmp_path: Path) -> None:
    trainer, watch = train(pair, tmp_path, SEQUENCE, eval_on_start=False, **validation_set(pair))
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        rows = [
            row for batch in watch.evaluated[-2:] for row in watch.sums(trainer, student, batch)
        ]
    assert len(rows) == 6
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(sequence_mean(rows), abs=TOLERANCE)
    assert abs(sequence_mean(rows) - token_mean(rows)) > 10 * TOLERANCE


def test_several_rollouts_are_all_trained_on(pair: Path, tmp_path: Path) -> None:
    """Token mean over 3 rollouts of each of 4 prompts, also where they are accumulated."""
    runs = []
    for size in (4, 1):
        trainer, watch = train(
            pair,
            tmp_path / str(size),
            rollout={"num_rollouts": 3},
            micro_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        assert len(watch.rows) == 2 * 4 * 3
        for step, loss in enumerate(logged(trainer)):
            rows = watch.rows[12 * step : 12 * step + 12]
            assert loss == pytest.approx(token_mean(rows), abs=1e-4)
        for got, expected, tokens in watch.records:
            assert got == pytest.approx(expected, abs=TOLERANCE * tokens)
        runs.append(weights(trainer))
    assert largest_difference(*runs) < 2e-6


@pytest.mark.parametrize("method", ["skd", "mixed_skd"])
def test_masked_rollouts_leave_the_others_mean(pair: Path, tmp_path: Path, method: str) -> None:
    trainer, watch = train(
        pair, tmp_path, method=method, rollout={"mask_truncated": True, "max_new_tokens": 5}
    )
    assert 0 < len(watch.rows) < 8
    for got, expected, tokens in watch.records:
        assert got == pytest.approx(expected, abs=TOLERANCE * tokens)
    assert all(0 < share < 1 for share in logged(trainer, "rollout/truncated_share"))


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("method", ["skd", "on_policy_kd"])
def test_a_window_masked_as_a_whole_trains_nothing(
    pair: Path, tmp_path: Path, method: str, normalize: str
) -> None:
    """A finite zero, and a backward pass that leaves the weights as they were."""
    start: dict[str, torch.Tensor] = {}
    config = base_config(
        pair,
        method=method,
        max_steps=2,
        rollout={"mask_truncated": True, "max_new_tokens": 1, "stop_token_ids": []},
        **SGD,
    )
    config["distillation"]["loss"] = {"normalize": normalize}
    trainer = run_training(config, tmp_path, lambda trainer: start.update(weights(trainer)))
    assert logged(trainer) == [0, 0]
    assert logged(trainer, "grad_norm") == [0, 0]
    assert logged(trainer, "rollout/truncated_share") == [1, 1]
    assert largest_difference(start, weights(trainer)) == 0
