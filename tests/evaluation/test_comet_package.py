"""unbabel-comet as a child process, played by a small module of its name and interface."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from axolotl_skd.evaluation.comet import CometUnavailableError, comet_scores

COMET = """
import importlib.util, json, os, sys

if importlib.util.find_spec("estimator"):
    sys.exit("modules of this package are in the way")

class Model:
    def predict(self, samples, batch_size, gpus, devices, progress_bar):
        asked = {"batch_size": batch_size, "gpus": gpus, "devices": devices, "path": self.path,
                 "RANK": os.environ.get("RANK")}
        with open(os.environ["ASKED"], "w") as file:
            json.dump(asked, file)
        print("[0.1, 0.2]")  # Lightning talks on the standard output
        if any(sample["mt"] == "crash" for sample in samples):
            sys.exit("out of luck")
        return {"scores": [len(s["src"]) + len(s["mt"]) / 10 + len(s["ref"]) / 100 for s in samples]}

def load_from_checkpoint(path):
    model = Model()
    model.path = path
    return model
"""
TORCH = """
import os
class cuda:
    is_available = staticmethod(lambda: os.environ.get("GPU") == "1")
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "model.ckpt").touch()
    (folder / "hparams.yaml").touch()
    return folder


def fake_python(folder: Path, *modules: str) -> Path:
    """An interpreter that has these modules, and not what this one has installed."""
    folder.mkdir()
    for name, code in (("comet", COMET), ("torch", TORCH)):
        if name in modules:
            (folder / f"{name}.py").write_text(code)
    python = folder / "python"
    command = f"PYTHONPATH={shlex.quote(str(folder))} exec {shlex.quote(sys.executable)} -S"
    python.write_text(f'#!/bin/sh\n{command} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return fake_python(tmp_path / "an env", "comet", "torch")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.json"))
    return tmp_path / "asked.json"


def test_the_scores_come_back(checkpoint: Path, python: Path, asked: Path) -> None:
    scores = comet_scores(
        ["a", "abc"], ["\u2028মই", ""], ["x" * 3, "x" * 4], checkpoint=checkpoint, python=python
    )
    assert scores == pytest.approx([133.0, 304.0])
    assert json.loads(asked.read_text())["path"] == str(checkpoint / "checkpoints/model.ckpt")


@pytest.mark.parametrize(
    ("device", "gpu", "gpus", "devices"),
    [
        ("auto", "0", 0, None),
        ("auto", "1", 1, None),
        ("cpu", "1", 0, None),
        ("cuda", "0", 1, None),
        ("cuda:3", "1", 1, [3]),
    ],
)
def test_batch_size_and_device(
    checkpoint: Path,
    python: Path,
    asked: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    gpu: str,
    gpus: int,
    devices: list[int] | None,
) -> None:
    monkeypatch.setenv("GPU", gpu)
    monkeypatch.setenv("SKD_COMET_PYTHON", str(python))
    monkeypatch.setenv("RANK", "0")
    comet_scores(["a"], ["b"], ["c"], checkpoint=checkpoint, batch_size=7, device=device)
    told = json.loads(asked.read_text())
    assert (told["batch_size"], told["gpus"], told["devices"]) == (7, gpus, devices)
    assert told["RANK"] is None  # or Lightning would wait for other ranks


def test_modules_of_this_place_do_not_get_in_the_way(
    tmp_path: Path,
    checkpoint: Path,
    python: Path,
    asked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the working folder, nor this package, nor PYTHONPATH holds the child's `comet`."""
    (tmp_path / "comet.py").write_text("raise RuntimeError('the wrong one')")
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plain_python = tmp_path / "plain python"
    plain_python.symlink_to(sys.executable)
    assert comet_scores(["a"], ["b"], ["c"], checkpoint=checkpoint, python="an env/python")
    with pytest.raises(CometUnavailableError) as caught:
        comet_scores(["a"], ["b"], ["c"], checkpoint=checkpoint, python=plain_python)
    assert "the wrong one" not in str(caught.value)


def fail(checkpoint: Path, python: Any, translation: str = "b") -> str:
    with pytest.raises(CometUnavailableError) as caught:
        comet_scores(["a"], [translation], ["c"], checkpoint=checkpoint, python=python)
    return str(caught.value)


def test_no_comet_in_that_python(tmp_path: Path, checkpoint: Path) -> None:
    message = fail(checkpoint, fake_python(tmp_path / "empty", "torch"))
    assert "unbabel-comet cannot be imported in" in message
    assert "-m pip install 'unbabel-comet>=2.2.7' 'setuptools<81'" in message


def test_a_failure_shows_its_last_lines(checkpoint: Path, python: Path, asked: Path) -> None:
    assert "exit code 1" in fail(checkpoint, python, "crash")
    assert "out of luck" in fail(checkpoint, python, "crash")


def test_no_python_there(checkpoint: Path, tmp_path: Path) -> None:
    assert "cannot be run" in fail(checkpoint, tmp_path / "nothing")
    assert "cannot be run" in fail(checkpoint, checkpoint / "hparams.yaml")  # not executable


def test_a_checkpoint_is_needed_here_too(tmp_path: Path, python: Path) -> None:
    assert "is no folder with hparams.yaml" in fail(tmp_path / "nothing", python)
