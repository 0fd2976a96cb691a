"""Two CPU ranks: the same rollouts and, to rounding, the same weights as one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.harness import base_config, largest_difference, save_rows, validation_set

ROOT = Path(__file__).parents[2]


def launch(ranks: int, config: dict[str, Any], folder: Path, **environment: str) -> str:
    """Run `two_ranks.py` on so many ranks to its end; returns its output."""
    child = start(ranks, config, folder, **environment)
    assert child.returncode == 0, child.stdout[-6000:]
    return child.stdout


def start(
    ranks: int, config: dict[str, Any], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `two_ranks.py` on so many ranks."""
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--standalone", "-m", "tests.training.two_ranks", str(path), str(folder)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def results(folder: Path, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=False)


@pytest.mark.ranks
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_two_ranks_equal_one(pair: Path, tmp_path: Path, normalize: str) -> None:
    """Rows of unequal length, so per-rank normalisation or separate training would show.

    11 validation rows do not fill two ranks: the repeated ones must not count.
    """
    save_rows(tmp_path / "validation.jsonl", 11, first=200)
    # Accelerate fills the last batches of an epoch by repeating rows, so 12 rows for 4 a step.
    save_rows(tmp_path / "train.jsonl", 12)
    config = base_config(
        pair, optimizer="sgd", learning_rate=0.05, max_steps=4, **validation_set(pair)
    )
    # Steered by the counts of all ranks: another K would give other rollouts.
    config["distillation"]["rollout"]["teacher_top_k"] = {"target_acceptance": 0.9, "start": 20}
    config["distillation"]["loss"] = {"normalize": normalize}
    config["datasets"][0]["path"] = str(tmp_path / "train.jsonl")
    config["test_datasets"][0]["path"] = str(tmp_path / "validation.jsonl")
    config["dataset_prepared_path"] = str(tmp_path / "prepared")
    launch(1, {**config, "micro_batch_size": 2, "gradient_accumulation_steps": 2}, tmp_path / "one")
    launch(2, {**config, "micro_batch_size": 2}, tmp_path / "two")

    one = results(tmp_path / "one", 0)
    two = [results(tmp_path / "two", rank) for rank in (0, 1)]
    assert one["processes"] == 1 and two[0]["processes"] == 2

    assert len(two[0]["rows"]) and len(two[1]["rows"])
    samples = two[0]["rows"].keys() | two[1]["rows"].keys()
    assert samples == one["rows"].keys()
    for sample in samples:  # once an epoch, on either rank
        rollouts = [ids for rank in two for ids in rank["rows"].get(sample, [])]
        assert sorted(rollouts) == sorted(one["rows"][sample])

    # SGD keeps differences as small as those of the gradients: rounding of sums in another order.
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-5
    assert len({line["skd/teacher_top_k"] for line in one["log"] if "loss" in line}) > 2
    for key in (
        "loss",
        "eval_loss",
        "skd/acceptance_rate",
        "skd/teacher_top_k",
        "rollout/length",
    ):
        assert [line[key] for line in two[0]["log"] if key in line] == pytest.approx(
            [line[key] for line in one["log"] if key in line], abs=1e-4
        ), key


@pytest.mark.ranks
def test_ranks_that_train_alone_are_refused(pair: Path, tmp_path: Path) -> None:
    """What happens without the plugin's ACCELERATE_USE_CPU: accelerate sees one process per rank."""
    with pytest.raises(AssertionError, match="2 ranks were launched, but each sees 1"):
        launch(2, base_config(pair, max_steps=1), tmp_path / "alone", ACCELERATE_USE_CPU="false")


@pytest.mark.ranks
def test_one_failing_rank_stops_all_with_its_own_error(pair: Path, tmp_path: Path) -> None:
    """The other one waits for it in a collective operation, and is not left there."""
    child = start(2, base_config(pair, max_steps=3), tmp_path / "run", FAULT="fail")
    assert child.returncode != 0
    assert "[rank1]: RuntimeError: the last rank is out of luck" in child.stdout
    assert not list((tmp_path / "run").glob("rank*.pt"))


@pytest.mark.ranks
def test_ctrl_c_on_one_rank_ends_all_after_the_same_step(pair: Path, tmp_path: Path) -> None:
    config = base_config(pair, max_steps=4)
    output = launch(2, config, tmp_path / "run", FAULT="ctrl_c")
    assert output.count("Ended by Ctrl-C after step 2") == 1
    assert [results(tmp_path / "run", rank)["steps"] for rank in (0, 1)] == [2, 2]
    checkpoint = tmp_path / "run" / "rank0" / "checkpoint-2"
    assert (checkpoint / "trainer_state.json").exists()
