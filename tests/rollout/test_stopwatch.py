"""Laps of the stopwatch, on the host's clock and on events."""

from __future__ import annotations

import time

import pytest
import torch

from axolotl_skd.rollout import stopwatch
from axolotl_skd.rollout.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still between hand-set moments."""

    def __init__(self, moments: list[float]) -> None:
        self._moments = iter(moments)

    def perf_counter(self) -> float:
        return next(self._moments)


def test_laps_lie_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "time", Clock([10.0, 10.5, 12.5, 12.75]))
    watch = Stopwatch(CPU)
    for _ in range(4):
        watch.mark()
    assert watch.laps() == [0.5, 2.0, 0.25]


def test_reading_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time between the last mark before and the first mark after is no lap."""
    monkeypatch.setattr(stopwatch, "time", Clock([1.0, 2.0, 50.0, 53.0]))
    watch = Stopwatch(CPU)
    watch.mark()
    watch.mark()
    assert watch.laps() == [1.0]
    assert watch.laps() == []
    watch.mark()
    assert watch.laps() == []  # one mark alone bounds no lap, and is dropped too
    watch.mark()
    assert watch.laps() == []


def test_laps_are_seconds() -> None:
    watch = Stopwatch(CPU)
    watch.mark()
    started = time.perf_counter()
    time.sleep(0.01)
    slept = time.perf_counter() - started
    watch.mark()
    (lap,) = watch.laps()
    assert 0.01 <= slept <= lap < slept + 1.0


class Event:
    """Of a device's stream: milliseconds, as all backends of torch count."""

    now = 0.0

    def __init__(self, device: torch.device, enable_timing: bool = False) -> None:
        assert device.type == "cuda" and enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


def test_events_are_read_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for moment in (0.0, 250.0, 3250.0):
        Event.now = moment
        watch.mark()
    assert watch.laps() == [0.25, 3.0]
    assert watch.laps() == []
