"""Ctrl-C in between steps, twice, and on another rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl_skd import interruption
from axolotl_skd.interruption import Interruption, say_how_to_go_on


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(interruption, "time", clock := Clock())
    return clock


def end_step(callback: Interruption, step: int) -> Any:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    args = SimpleNamespace(load_best_model_at_end=True, save_total_limit=1)
    callback.on_step_end(args, SimpleNamespace(global_step=step, max_steps=9), control)
    # At an end of training that is none, no other weights are taken and no checkpoint goes.
    ended = control.should_training_stop
    assert (args.load_best_model_at_end, args.save_total_limit) == (
        (False, None) if ended else (True, 1)
    )
    return control


@pytest.fixture
def handled() -> Any:
    """What Ctrl-C does outside of training: notes itself."""
    calls: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda signum, _frame: calls.append(signum))
    yield calls
    signal.signal(signal.SIGINT, previous)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_ends_training_the_second_does_what_it_did_before(
    clock: Clock, handled: list[int], capfd: pytest.CaptureFixture
) -> None:
    callback = Interruption(lambda here: here)
    callback.on_train_begin(None, None, None)
    assert not end_step(callback, 1).should_training_stop
    press()
    clock.now += 0.5
    press()  # the same one, passed on by a launcher
    assert handled == [] and capfd.readouterr().err.count("training ends after the step") == 1
    control = end_step(callback, 2)
    assert control.should_save and control.should_training_stop and callback.stopped_at == 2
    clock.now += 1.0
    press()
    assert handled == [signal.SIGINT]


def test_the_handler_of_before_comes_back(handled: list[int]) -> None:
    callback = Interruption(lambda here: here)
    callback.on_train_begin(None, None, None)
    callback.on_train_end(None, None, None)
    press()
    assert handled == [signal.SIGINT] and not end_step(callback, 1).should_save


def test_workers_that_load_data_leave_it_to_their_parent(
    clock: Clock, handled: list[int], capfd: pytest.CaptureFixture
) -> None:
    callback = Interruption(lambda here: here)
    callback.on_train_begin(None, None, None)
    child = os.fork()
    if child == 0:
        press()
        clock.now += 2.0
        press()
        os._exit(len(handled))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr().err == "" and not end_step(callback, 1).should_training_stop


def test_torchruns_patience_is_said(
    handled: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    callback = Interruption(lambda here: here)
    callback.on_train_begin(None, None, None)
    press()
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in capfd.readouterr().err


def test_an_interrupted_epoch_is_not_evaluated_and_saved_once_more() -> None:
    for stopped in (False, True):
        callback = Interruption(lambda here, stopped=stopped: stopped)
        end_step(callback, 8)
        control = SimpleNamespace(should_save=True, should_evaluate=True)
        callback.on_epoch_end(None, None, control)
        assert (control.should_save, control.should_evaluate) == (not stopped, not stopped)


def test_a_checkpoint_that_is_not_there_is_not_promised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say_how_to_go_on(3, str(tmp_path), "config.yml", only_model=False)
    said = caplog.text
    assert "checkpoint-3 is not whole (there is no such folder)" in said
    assert "--resume-from-checkpoint" not in said


def test_what_another_rank_heard_counts_and_the_last_step_is_no_interruption(
    handled: list[int],
) -> None:
    callback = Interruption(lambda here: True)
    assert not end_step(callback, 9).should_training_stop and callback.stopped_at is None
    assert end_step(callback, 8).should_training_stop and callback.stopped_at == 8
