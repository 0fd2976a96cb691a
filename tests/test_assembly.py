"""Launches that cannot work are refused before any model is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from axolotl_skd.assembly import _refuse_lonely_ranks, _take_one_gpu
from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.ranks import num_launched

LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def trainer(processes: int = 1, gpus: int = 1) -> Any:
    class Arguments:
        _n_gpu = gpus
        n_gpu = property(lambda self: self._n_gpu)
        train_batch_size = property(lambda self: 4 * self._n_gpu)

    args = Arguments()
    return SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=processes),
        args=args,
        _train_batch_size=args.train_batch_size,
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_would_train_alone(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    _refuse_lonely_ranks(trainer())
    monkeypatch.setenv(launcher, "2")
    assert num_launched() == 2
    _refuse_lonely_ranks(trainer(processes=2))
    with pytest.raises(ConfigConflictError, match="2 ranks were launched, but each sees 1"):
        _refuse_lonely_ranks(trainer())


def test_a_launcher_may_itself_be_launched_on_every_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert num_launched() == 16


def test_several_gpus_of_one_process_are_for_the_teacher() -> None:
    alone = TeacherConfig(base_model="t")
    _take_one_gpu(trainer(), alone)
    with pytest.raises(ConfigConflictError, match="one process sees 2 GPUs.*teacher.device or dev"):
        _take_one_gpu(trainer(gpus=2), alone)
    for keys in ({"device": "cuda:1"}, {"device_map": "auto"}):
        taken = trainer(gpus=2)
        _take_one_gpu(taken, TeacherConfig(base_model="t", **keys))
        assert (taken.args.n_gpu, taken._train_batch_size) == (1, 4)
