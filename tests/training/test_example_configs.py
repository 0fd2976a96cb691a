"""The config of each method for the tiny pair trains: two steps of it, on a few rows of its data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_skd.methods import METHODS
from axolotl_skd.resources import resource_path
from tests.training.harness import largest_difference, run_training, saved_weights, weights

FOLDER = resource_path("example_configs")
ROWS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the first rows of the tiny training data, prepared once for all methods."""
    lines = (FOLDER / "tiny" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("\n".join(lines[:ROWS]) + "\n", encoding="utf-8")
    return folder


def shortened(method: str, folder: Path) -> dict[str, Any]:
    """Two steps of four rows, without validation and evaluation; paths that hold anywhere."""
    config = yaml.safe_load((FOLDER / f"{method}_tiny.yml").read_text(encoding="utf-8"))
    block = config["distillation"]
    del block["eval"]
    if "teacher" in block:
        block["teacher"]["base_model"] = str(FOLDER.parent / block["teacher"]["base_model"])
    for key in ("test_datasets", "eval_strategy", "eval_steps", "save_steps", "save_total_limit"):
        del config[key]
    config["datasets"][0]["path"] = str(folder / "train.jsonl")
    return {
        **config,
        "base_model": str(FOLDER.parent / config["base_model"]),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "val_set_size": 0,
        "max_steps": 2,
        "micro_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_config_of_a_method_trains(method: str, folder: Path, tmp_path: Path) -> None:
    config = shortened(method, folder)
    trainer = run_training(config, tmp_path)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == trainer.state.global_step == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    trained = weights(trainer)
    assert largest_difference(trained, saved_weights(Path(config["base_model"]))) > 1e-4
    assert all(bool(value.isfinite().all()) for value in trained.values())
