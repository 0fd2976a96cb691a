"""Durations of device work that are read without waiting for the device a second time."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Marks on a device's time line: host clock on a CPU, events in its stream elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type != "cpu"
        self._device = device
        self._marks: list[float | torch.Event] = []

    def mark(self) -> None:
        """Note this moment, behind all work given to the device so far."""
        if not self._events:
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        """Seconds between successive marks, and start anew.

        Only once the device is known to have passed the last mark, i.e. after reading a result of
        the work behind which it was set.
        """
        marks, self._marks = self._marks, []
        if not self._events:
            return [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)]
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
