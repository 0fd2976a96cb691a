"""Ctrl-C in between steps, twice, and on another rank."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl_skd import interruption
from axolotl_skd.interruption import Interruption


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
    callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), control)
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


def test_what_another_rank_heard_counts_and_the_last_step_is_no_interruption(
    handled: list[int],
) -> None:
    callback = Interruption(lambda here: True)
    assert not end_step(callback, 9).should_training_stop and callback.stopped_at is None
    assert end_step(callback, 8).should_training_stop and callback.stopped_at == 8
