"""Training on prompts without completions: rolled out like others, validated on rows that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.prompts import DATASET_TYPE
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import base_config, run_training, validation_set


def prompts_of(path: Path, target: Path) -> Path:
    """The rows of `path` without their answers."""
    rows = [json.loads(line)["messages"][:-1] for line in path.read_text().splitlines()]
    target.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return target


@pytest.mark.parametrize("method", ["skd", "on_policy_kd", "seqkd"])
def test_prompts_are_enough(pair: Path, tmp_path: Path, method: str) -> None:
    config = base_config(
        pair,
        method=method,
        max_steps=2,
        rollout={"stop_token_ids": []},
        **validation_set(pair),
    )
    train = prompts_of(pair / "train.jsonl", tmp_path / "prompts.jsonl")
    config["datasets"] = [{"path": str(train), "ds_type": "json", "type": DATASET_TYPE}]
    config["datasets"][0]["split"] = "train"
    config["dataset_prepared_path"] = str(tmp_path / "prepared")
    trained: list[tuple[list[int], list[int]]] = []

    def watch(trainer: DistillationTrainer) -> None:
        complete = trainer.distiller.source.complete

        def watched(batches: list[dict[str, Any]], *args: Any) -> Any:
            completed, metrics = complete(batches, *args)
            for batch in completed:
                for ids, labels, length in zip(
                    batch["input_ids"], batch["labels"], batch["prompt_lengths"], strict=True
                ):
                    assert (labels[:length] == -100).all()
                    trained.append((ids[:length].tolist(), labels[labels != -100].tolist()))
            return completed, metrics

        trainer.distiller.source.complete = watched

    trainer = run_training(config, tmp_path / "out", watch)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and torch.tensor(losses).isfinite().all()
    assert any("eval_loss" in line for line in trainer.state.log_history)
    header = trainer.processing_class.encode("<|im_start|>assistant\n")
    assert len(trained) == 8
    assert all(prompt[-len(header) :] == header for prompt, _ in trained)
    # Sampled completions: the stand-in alone would be one token each.
    assert sum(len(completion) for _, completion in trained) > 2 * len(trained)
