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
import yaml

from axolotl_skd.resources import resource_path
from tests.training.harness import SGD, base_config, largest_difference, save_rows, validation_set
from tests.training.two_ranks import trained

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def start(
    ranks: int, module: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks; its output is in `stdout`."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*command, "--standalone", "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def launch(
    ranks: int, configs: dict[str, dict[str, Any]], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `two_ranks.py` on so many ranks."""
    folder.mkdir(exist_ok=True)
    path = folder / "configs.json"
    path.write_text(json.dumps(configs))
    module = "tests.training.two_ranks"
    return start(ranks, module, str(path), str(folder), **environment)


def succeed(ranks: int, configs: dict[str, dict[str, Any]], folder: Path) -> None:
    child = launch(ranks, configs, folder)
    assert child.returncode == 0, child.stdout[-6000:]


def results(folder: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank left of a training."""
    paths = [folder / name / f"rank{rank}.pt" for rank in range(ranks)]
    return [torch.load(path, weights_only=False) for path in paths]


def assert_same_rollouts(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    """Each sample once an epoch on any of the ranks, with the same tokens."""
    assert all(rank["rows"] for rank in several)
    assert set().union(*(rank["rows"] for rank in several)) == one["rows"].keys()
    for sample, expected in one["rows"].items():
        rollouts = [ids for rank in several for ids in rank["rows"].get(sample, [])]
        assert sorted(rollouts) == sorted(expected)


def logged(result: dict[str, Any], key: str) -> list[float]:
    return [line[key] for line in result["log"] if key in line]


@pytest.mark.ranks
def test_two_ranks_equal_one(pair: Path, tmp_path: Path) -> None:
    """Rows of unequal length, so per-rank normalisation or separate training would show.

    11 validation rows do not fill two ranks: the repeated ones must not count.
    """
    save_rows(tmp_path / "validation.jsonl", 11, first=200)
    # Accelerate fills the last batches of an epoch by repeating rows, so 12 rows for 4 a step.
    save_rows(tmp_path / "train.jsonl", 12)
    config = base_config(pair, **SGD, **validation_set(pair))
    # Steered by the counts of all ranks: another K would give other rollouts.
    config["distillation"]["rollout"]["teacher_top_k"] = {"target_acceptance": 0.9, "start": 20}
    config["datasets"][0]["path"] = str(tmp_path / "train.jsonl")
    config["test_datasets"][0]["path"] = str(tmp_path / "validation.jsonl")
    config["dataset_prepared_path"] = str(tmp_path / "prepared")
    configs = {}
    for normalize in ("token", "sequence"):
        block = {**config["distillation"], "loss": {"normalize": normalize}}
        configs[normalize] = {**config, "distillation": block, "micro_batch_size": 2}
    tiny = tiny_config(tmp_path)
    succeed(2, {**configs, "tiny": {**tiny, "micro_batch_size": 4}}, tmp_path / "two")

    for name, config in {**configs, "tiny": {**tiny, "micro_batch_size": 4}}.items():
        one = trained({**config, "gradient_accumulation_steps": 2}, tmp_path / "one" / name)
        two = results(tmp_path / "two", name, ranks=2)
        assert (one["processes"], two[0]["processes"]) == (1, 2)
        assert_same_rollouts(one, two)
        # SGD keeps differences as small as those of the gradients: rounding of sums in another order.
        assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
        assert largest_difference(one["weights"], two[0]["weights"]) < 1e-5
        for key in (
            "loss",
            "eval_loss",
            "skd/acceptance_rate",
            "skd/teacher_top_k",
            "rollout/length",
        ):
            assert logged(two[0], key) == pytest.approx(logged(one, key), abs=1e-4), key
        if name != "tiny":
            assert len(set(logged(one, "skd/teacher_top_k"))) > 2


def tiny_config(folder: Path) -> dict[str, Any]:
    """A few steps of `skd_tiny.yml`, of its data's first rows, under SGD."""
    examples = resource_path("example_configs")
    config = yaml.safe_load((examples / "skd_tiny.yml").read_text(encoding="utf-8"))
    lines = (examples / "tiny" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "tiny.jsonl").write_text("\n".join(lines[:24]) + "\n", encoding="utf-8")
    del config["distillation"]["eval"], config["test_datasets"]
    for key in ("eval_strategy", "eval_steps", "save_steps", "save_total_limit"):
        del config[key]
    config["datasets"][0]["path"] = str(folder / "tiny.jsonl")
    config["base_model"] = str(examples / "tiny" / "student")
    config["distillation"]["teacher"]["base_model"] = str(examples / "tiny" / "teacher")
    return {
        **config,
        **SGD,
        "lr_scheduler": "constant",
        "warmup_ratio": None,
        "dataset_prepared_path": str(folder / "tiny_prepared"),
        "dataset_num_proc": 1,
        "val_set_size": 0,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
    }


@pytest.mark.ranks
def test_ranks_that_train_alone_are_refused(pair: Path, tmp_path: Path) -> None:
    """What happens without the plugin's ACCELERATE_USE_CPU: accelerate sees one process per rank."""
    config = base_config(pair, max_steps=1)
    child = launch(2, {"alone": config}, tmp_path / "alone", ACCELERATE_USE_CPU="false")
    assert child.returncode != 0
    assert "2 ranks were launched, but each sees 1" in child.stdout


@pytest.mark.ranks
def test_a_rank_that_fails_stops_all_with_its_error(pair: Path, tmp_path: Path) -> None:
    """The other one waits for it in a collective operation, and is not left there."""
    child = launch(2, {"one": base_config(pair, max_steps=3)}, tmp_path / "fails", FAULT="fail")
    assert child.returncode != 0
    assert "[rank1]: RuntimeError: the last rank is out of luck" in child.stdout
    assert not list((tmp_path / "fails" / "one").glob("rank*.pt"))


@pytest.mark.ranks
def test_a_killed_rank_costs_the_open_step(pair: Path, tmp_path: Path) -> None:
    """All are started again, and the result is the uninterrupted run's bit by bit."""
    config = base_config(pair, max_steps=3, save_strategy="steps", save_steps=1)
    config |= {"auto_resume_from_checkpoints": True, "micro_batch_size": 2}
    succeed(2, {"one": config}, tmp_path / "through")
    child = launch(2, {"one": config}, tmp_path / "killed", FAULT="kill")
    assert child.returncode != 0 and "SIGKILL" in child.stdout
    child = launch(2, {"one": config}, tmp_path / "killed")
    assert child.returncode == 0, child.stdout[-6000:]
    assert "killed/one/model/checkpoint-1" in child.stdout
    through, killed = (results(tmp_path / name, "one", 2) for name in ("through", "killed"))
    for one, other in zip(through, killed, strict=True):
        assert largest_difference(one["weights"], other["weights"]) == 0
        assert other["steps"] == 3
        for key in ("loss", "grad_norm", "rollout/length", "tokens/total"):
            assert logged(one, key) == logged(other, key) and len(logged(one, key)) == 3, key


@pytest.mark.ranks
def test_ctrl_c_on_one_rank_ends_all_after_the_same_step(pair: Path, tmp_path: Path) -> None:
    child = launch(2, {"one": base_config(pair, max_steps=4)}, tmp_path / "run", FAULT="ctrl_c")
    assert child.returncode == 0, child.stdout[-6000:]
    assert child.stdout.count("Ended by Ctrl-C after step 2") == 1
    assert [rank["steps"] for rank in results(tmp_path / "run", "one", 2)] == [2, 2]
    assert (tmp_path / "run" / "one" / "model" / "checkpoint-2" / "trainer_state.json").exists()
