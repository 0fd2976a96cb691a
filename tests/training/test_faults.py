"""Faults survived: what is lost is the open step alone, and the result is the uninterrupted run's."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from axolotl_skd.checkpoints import missing
from tests.training import dying
from tests.training.harness import base_config, largest_difference, validation_set

STEPS = 6
# Keys of a log line that say how long something took, or what this process needed so far.
TIMES = re.compile("seconds|per_second|per_sec|runtime|memory|tgs|elapsed")


def config(pair: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """6 steps over 2 epochs, a checkpoint after each; starting again goes on where it was."""
    return base_config(
        pair,
        **{
            "dataset_prepared_path": str(folder / "prepared"),
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 9,
            "auto_resume_from_checkpoints": True,
            "lr_scheduler": "linear",
            **keys,
        },
    )


def result(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "result.pt", weights_only=False)


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit by bit: weights, and what the log says that is no time."""
    assert largest_difference(one["weights"], other["weights"]) == 0
    logs = [[line for line in run["log"] if "loss" in line] for run in (one, other)]
    assert [len(log) for log in logs] == [STEPS, STEPS]
    said = [
        [{k: v for k, v in line.items() if not TIMES.search(k)} for line in log] for log in logs
    ]
    assert said[0] == said[1]
    assert {"loss", "grad_norm", "tokens/total", "skd/acceptance_rate"} <= said[0][0].keys() or (
        "skd/acceptance_rate" not in logs[0][0]
    )


@pytest.fixture(scope="module")
def whole_run(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("through")
    code, output = dying.run(config(pair, folder), folder)
    assert code == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def through(whole_run: Path) -> dict[str, Any]:
    return result(whole_run)


@pytest.mark.parametrize(
    "fault", [dying.killed_in_rollout, dying.killed_in_backward, dying.killed_in_checkpoint]
)
def test_a_killed_run_goes_on(
    pair: Path, tmp_path: Path, through: dict[str, Any], fault: Callable[[], Any]
) -> None:
    code, output = dying.run(config(pair, tmp_path), tmp_path, fault)
    assert code == -signal.SIGKILL, output[-3000:]
    assert not (tmp_path / "result.pt").exists()
    half_written = fault is dying.killed_in_checkpoint
    assert (tmp_path / "checkpoint-3").exists() == half_written

    code, output = dying.run(config(pair, tmp_path), tmp_path)
    assert code == 0, output[-3000:]
    ended = result(tmp_path)
    assert ended["steps"] == [3, 4, 5, 6]
    assert_same_run(through, ended)
    flat = " ".join(output.split())
    assert f"going on from {tmp_path}/checkpoint-2" in flat
    assert (
        "checkpoint-3 is half-written (no trainer_state.json, no scheduler.pt, no rng" in flat
    ) == (half_written)
    assert missing(tmp_path / "checkpoint-3") == []


def test_a_checkpoint_that_is_overwritten_does_not_look_whole(
    pair: Path, tmp_path: Path, whole_run: Path
) -> None:
    """New weights beside an old optimizer."""
    for step in (2, 3):
        shutil.copytree(whole_run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert missing(tmp_path / "checkpoint-3") == []
    resumed = tmp_path / "checkpoint-2"
    again = {**config(pair, whole_run), "resume_from_checkpoint": str(resumed)}
    code, output = dying.run(again, tmp_path, dying.killed_before_optimizer)
    assert code == -signal.SIGKILL, output[-3000:]
    assert "no trainer_state.json" in missing(tmp_path / "checkpoint-3")
    assert not (tmp_path / "checkpoint-3" / "optimizer.pt").exists()  # nothing of the old one


def test_ctrl_c_ends_after_the_step_and_says_how_to_go_on(
    pair: Path, tmp_path: Path, through: dict[str, Any]
) -> None:
    settings = config(pair, tmp_path, save_strategy="no", save_steps=None)
    code, output = dying.run(settings, tmp_path, dying.ctrl_c_in_rollout)
    assert code == 0, output[-3000:]
    assert result(tmp_path)["steps"] == [1, 2, 3]
    assert "Ctrl-C: training ends after the step in progress" in output
    command = (
        f"axolotl train {tmp_path}/config.yml --resume-from-checkpoint {tmp_path}/checkpoint-3"
    )
    assert command in output
    assert (tmp_path / "model.safetensors").exists()

    checkpoint = command.split()[-1]
    code, output = dying.run({**settings, "resume_from_checkpoint": checkpoint}, tmp_path)
    assert code == 0, output[-3000:]
    assert result(tmp_path)["steps"] == [4, 5, 6]
    assert_same_run(through, result(tmp_path))


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_ctrl_c_leaves_what_it_says_whatever_else_is_saved(
    pair: Path, tmp_path: Path, strategy: str
) -> None:
    """Where the end of an epoch would be saved too, and where only the best checkpoint is kept."""
    keys = {"save_strategy": "epoch", "save_steps": None, "save_total_limit": 1}
    if strategy == "best":
        # So fast that the first step is the best.
        keys = {"save_total_limit": 1, "load_best_model_at_end": True, "learning_rate": 0.5}
        keys |= {**validation_set(pair), "eval_steps": 1}
    settings = config(pair, tmp_path, **keys)
    code, output = dying.run(settings, tmp_path, dying.ctrl_c_in_rollout)
    assert code == 0, output[-3000:]
    checkpoint = tmp_path / "checkpoint-3"
    assert output.count(f"Saving model checkpoint to {checkpoint}") == 1
    assert f"--resume-from-checkpoint {checkpoint}" in output and missing(checkpoint) == []
    ended = result(tmp_path)
    saved = load_file(checkpoint / "model.safetensors")
    assert largest_difference(saved, load_file(tmp_path / "model.safetensors")) == 0
    code, output = dying.run(settings, tmp_path)
    assert code == 0, output[-3000:]
    assert (ended["steps"], result(tmp_path)["steps"]) == ([1, 2, 3], [4, 5, 6])


def test_killed_while_the_teacher_writes(pair: Path, tmp_path: Path) -> None:
    """Ten sequences in batches of four: the first four are kept."""
    settings = {
        name: config(pair, tmp_path / name, method="seqkd", save_strategy="no", save_steps=None)
        for name in ("through", "killed")
    }
    code, output = dying.run(settings["through"], tmp_path / "through")
    assert code == 0, output[-3000:]
    code, output = dying.run(settings["killed"], tmp_path / "killed", dying.killed_in_generation)
    assert code == -signal.SIGKILL, output[-3000:]
    code, output = dying.run(settings["killed"], tmp_path / "killed")
    assert code == 0, output[-3000:]
    assert "4 of 10 teacher sequences are there already" in " ".join(output.split())
    assert_same_run(result(tmp_path / "through"), result(tmp_path / "killed"))


def test_a_full_disk_stops_no_training(pair: Path, tmp_path: Path, through: dict[str, Any]) -> None:
    """Neither Axolotl's debug.log nor TensorBoard's events can be written; the kernel says so."""
    (tmp_path / "debug.log").symlink_to("/dev/full")
    settings = config(pair, tmp_path, save_strategy="no", save_steps=None, use_tensorboard=True)
    code, output = dying.run(settings, tmp_path, dying.full_disk)
    assert code == 0, output[-3000:]
    assert_same_run(through, result(tmp_path))
    flat = " ".join(output.split())
    assert "TensorBoardCallback cannot write ([Errno 28] No space left on device)" in flat
    assert flat.count("debug.log, cannot be written ([Errno 28]") == 1
