"""The scores of the bundled evaluation in real trackers (TensorBoard, wandb offline) and stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from axolotl_skd import trackers
from axolotl_skd.trackers import TrackedScores

START, END = {"arith": {"acc": 0.25}}, {"arith": {"acc": 0.75}}


class Training:
    """A trainer's callbacks, and what a trainer does with them."""

    def __init__(self, folder: Path, *callbacks: TrainerCallback) -> None:
        self.args = TrainingArguments(str(folder), report_to=[], use_cpu=True)
        self.state = TrainerState(is_world_process_zero=True)
        self.callbacks = list(callbacks)
        self.scores = TrackedScores(self.callbacks, lambda: START)
        self.callbacks.append(self.scores)

    def run(self, steps: int = 7) -> None:
        self.call("on_train_begin", model=None)
        self.state.global_step = steps
        self.call("on_log", logs={"loss": 1.0})
        self.call("on_train_end", model=None)

    def call(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, TrainerControl(), **kwargs)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logged: list[str] = []
    monkeypatch.setattr(trackers.LOG, "warning", lambda text, *args: logged.append(text % args))
    return logged


def test_tensorboard_has_both_in_one_run(tmp_path: Path, warnings: list[str]) -> None:
    training = Training(tmp_path, TensorBoardCallback())
    training.run()
    training.scores.log_end(END)
    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/arith/acc")] == [(0, 0.25), (7, 0.75)]
    assert warnings == []


def test_the_start_is_at_step_zero_of_a_resumed_run_too(tmp_path: Path) -> None:
    training = Training(tmp_path, TensorBoardCallback())
    training.state.global_step = 4
    training.run()
    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/arith/acc")] == [0]
    assert training.state.global_step == 7


def test_wandb_has_them_in_the_run_that_is_still_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    training = Training(tmp_path, WandbCallback())
    try:
        training.run()
        run, step = wandb.run.id, wandb.run.step
        assert wandb.run.summary["eval/arith/acc"] == 0.25
        training.scores.log_end(END)
        assert (wandb.run.id, wandb.run.step) == (run, step + 1)
        assert wandb.run.summary["eval/arith/acc"] == 0.75
        assert wandb.run.summary["train/global_step"] == 7
    finally:
        wandb.finish()
    training.scores.log_end(END)
    (warning,) = warnings
    assert warning.startswith("the evaluation's scores are not in Wandb:")


class FakeMlflow(SimpleNamespace):
    """As much of mlflow as is called: runs by id, at most one of them active."""

    def __init__(self) -> None:
        super().__init__(active=None, runs={}, count=0)

    def active_run(self) -> Any:
        return self.active and SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def start_run(self, run_id: str | None = None) -> None:
        assert self.active is None and (run_id is None or run_id in self.runs)
        self.active = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.active, [])

    def end_run(self) -> None:
        self.active = None

    def log_metrics(self, metrics: dict[str, float], step: int, **_: Any) -> None:
        if self.active is None:  # as mlflow does
            self.start_run()
        self.runs[self.active].append((step, metrics))


class OwnMlflow(MLflowCallback):
    """The real callback without the real package's imports and setup."""

    def __init__(self, mlflow: FakeMlflow, auto_end_run: bool = True) -> None:
        self._ml_flow, self._initialized = mlflow, False
        self._async_log, self._auto_end_run = True, auto_end_run

    def __del__(self) -> None: ...

    def setup(self, args: Any, state: Any, model: Any) -> None:
        if self._auto_end_run:
            self._ml_flow.start_run()
        self._initialized = True


@pytest.mark.parametrize("ours", [True, False])
def test_mlflow_goes_on_with_the_run_that_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    if not ours:
        mlflow.start_run()
    training = Training(tmp_path, OwnMlflow(mlflow, auto_end_run=ours))
    training.run()
    assert (mlflow.active is None) == ours
    training.scores.log_end(END)
    assert mlflow.runs == {
        "run0": [
            (0, {"eval_arith/acc": 0.25}),
            (7, {"loss": 1.0}),
            (7, {"eval_arith/acc": 0.75}),
        ]
    }
    assert (mlflow.active is None) == ours


class OwnTrackio(TrackioCallback):
    """The real callback with a stand-in for the package, whose unnamed runs get a random name."""

    def __init__(self, logged: list[tuple[str, dict[str, float]]]) -> None:
        self._initialized, self._space_id, self.logged = False, None, logged
        self._trackio = SimpleNamespace(
            log=lambda metrics: logged.append((self.run, metrics)), finish=lambda: None
        )

    def setup(self, args: Any, state: Any, model: Any) -> None:
        self.run = args.run_name or f"random{len(self.logged)}"
        current = SimpleNamespace(get=lambda: SimpleNamespace(name=self.run))
        sys.modules["trackio"].context_vars.current_run = current
        self._initialized = True


def test_trackio_goes_on_with_the_run_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(context_vars=SimpleNamespace()))
    logged: list[tuple[str, dict[str, float]]] = []
    training = Training(tmp_path, OwnTrackio(logged))
    training.run()
    training.scores.log_end(END)
    assert {run for run, _ in logged} == {"random0"}
    values = [metrics["eval/arith/acc"] for _, metrics in logged if "eval/arith/acc" in metrics]
    assert values == [0.25, 0.75]


class Broken(TensorBoardCallback):
    def __init__(self) -> None: ...

    def on_train_begin(self, *_: Any, **__: Any) -> None: ...

    def on_train_end(self, *_: Any, **__: Any) -> None: ...

    def on_log(self, *_: Any, **__: Any) -> None:
        raise OSError("disk full")


def test_a_tracker_that_fails_costs_a_warning_and_not_the_others(
    tmp_path: Path, warnings: list[str]
) -> None:
    training = Training(tmp_path, Broken(), TensorBoardCallback())
    training.call("on_train_begin", model=None)
    training.call("on_train_end", model=None)
    training.scores.log_end(END)
    assert warnings == ["the evaluation's scores are not in Broken: OSError: disk full"] * 2
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    assert len(events.Scalars("eval/arith/acc")) == 2


def test_other_ranks_log_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path, TensorBoardCallback())
    training.state.is_world_process_zero = False
    training.scores._start = lambda: pytest.fail("asked for")
    training.run()
    assert not (tmp_path / "runs").exists()


def test_a_run_that_never_trained_logs_nothing(tmp_path: Path) -> None:
    TrackedScores([TensorBoardCallback()], lambda: START).log_end(END)


def test_what_holds_the_trainer_is_let_go(tmp_path: Path) -> None:
    training = Training(tmp_path, TrainerCallback())
    training.call("on_train_begin", model=None)
    assert not training.scores._callbacks and not training.scores._trackers
