"""What the benchmarks share: interleaved repeats, clocks, resumable JSON, tables, arguments.

A *cell* is one contender at one setting. Cells that are compared form a group: every repeat runs each
of them once, in turn, in this process, so that a machine that slows down slows them all. Every run is
written to the JSON file at once; a second start of the same command goes on where the first one
stopped. A run counts only for the settings, machine and code it was made with: it is measured again
as soon as one of them is another.

Clocks: process CPU time on a CPU (a busy neighbour does not count), events between two synchronisations
on a GPU. Wall-clock time is kept beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import axolotl_skd

Facts = dict[str, Any]
"""What a run says about itself beside its time, as JSON values: tokens, rounds, loss, digests."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender at one setting.

    Attributes:
        name: unique in the benchmark; contender first, e.g. "ours G=5, a=0.6, B=8, T=32".
        run: what is timed.
        settings: what, beside the benchmark's own settings, a result is valid for.
        prepare: done before each run, untimed.
        repeats: at most so many runs, for contenders that take minutes.
    """

    name: str
    run: Callable[[], Facts]
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    repeats: int | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """The runs of a cell: seconds on the benchmark's clock, on the wall, facts of the last run."""

    seconds: tuple[float, ...]
    wall: tuple[float, ...]
    facts: Facts

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(max - min) / median"""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": {
                "median": self.median,
                "min": min(self.seconds),
                "max": max(self.seconds),
                "spread": self.spread,
                "runs": list(self.seconds),
            },
            "wall_seconds": list(self.wall),
            "facts": self.facts,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Measurement:
        return cls(tuple(record["seconds"]["runs"]), tuple(record["wall_seconds"]), record["facts"])


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio to reach: `measured` at most (or at least) `bound`."""

    text: str
    measured: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


class Benchmark:
    """The cells of one command, measured, kept in its JSON file and read back from there."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        device: torch.device,
        repeats: int,
        path: Path | None,
    ) -> None:
        """
        Args:
            name: of the command.
            settings: models, sizes: what all its cells share.
            device: decides the clock.
            repeats: runs of each cell.
            path: the JSON file, None to keep nothing.
        """
        self.name = name
        self.settings = {**settings, "repeats": repeats}
        self.machine = describe_machine(device)
        self.device = device
        self.repeats = repeats
        self.path = path
        self.goals: list[Goal] = []
        self.extra: dict[str, Any] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._warm: set[str] = set()
        self._code = code_digest()
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            if held["code"] == self._code:  # of other code nothing is worth keeping
                self._records = held["cells"]
                self.extra = {key: held[key] for key in ("profile",) if key in held}

    def measure(self, cells: Sequence[Cell]) -> dict[str, Measurement]:
        """Run a group of contenders in turn, until each has its repeats.

        Returns:
            by name, in the order of `cells`.
        """
        runs = {cell.name: self._known(cell) for cell in cells}
        if len(runs) != len(cells):
            raise ValueError(f"cells of a group need different names: {[c.name for c in cells]}")
        for repeat in range(self.repeats):
            for cell in cells:
                known = runs[cell.name]
                done = 0 if known is None else len(known.seconds)
                if done > repeat or repeat >= (cell.repeats or self.repeats):
                    continue
                runs[cell.name] = self._run_once(cell, known)
                self._keep(cell, runs[cell.name])
        return runs

    def _run_once(self, cell: Cell, known: Measurement | None) -> Measurement:
        if cell.name not in self._warm and self.device.type == "cuda":
            # Compilation and autotuning are paid once per process: not what is compared.
            self._warm.add(cell.name)
            self._prepared(cell)
            cell.run()
        self._prepared(cell)
        seconds, wall, facts = timed(cell.run, self.device)
        before = ((), ()) if known is None else (known.seconds, known.wall)
        measurement = Measurement((*before[0], seconds), (*before[1], wall), facts)
        print(f"  {cell.name}: {seconds:.3f} s", file=sys.stderr, flush=True)
        return measurement

    @staticmethod
    def _prepared(cell: Cell) -> None:
        if cell.prepare is not None:
            cell.prepare()

    def _key(self, cell: Cell) -> str:
        valid_for = [self.name, self.settings, self.machine, self._code, cell.name, cell.settings]
        return digest(valid_for)

    def _known(self, cell: Cell) -> Measurement | None:
        record = self._records.get(cell.name)
        if record is None or record["key"] != self._key(cell):
            return None
        return Measurement.from_json(record)

    def _keep(self, cell: Cell, measurement: Measurement) -> None:
        self._records[cell.name] = {
            "key": self._key(cell),
            "settings": dict(cell.settings),
            **measurement.as_json(),
        }
        self.write()

    def write(self) -> None:
        """Settings, machine, cells and goals to the JSON file; replaced in one step."""
        if self.path is None:
            return
        content = {
            "benchmark": self.name,
            "settings": self.settings,
            "machine": self.machine,
            "code": self._code,
            "cells": self._records,
            "goals": [
                {"goal": g.text, "measured": g.measured, "bound": g.bound, "met": g.met}
                for g in self.goals
            ],
            **self.extra,
        }
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.path)

    def duration(self) -> str:
        """How long all timed runs took, those of an earlier start included."""
        records = self._records.values()
        clock = sum(sum(record["seconds"]["runs"]) for record in records)
        wall = sum(sum(record["wall_seconds"]) for record in records)
        return f"measured in {clock / 60:.1f} minutes of this clock, {wall / 60:.1f} of wall-clock time"

    def header(self) -> str:
        """What was measured where, as a Markdown list."""
        lines = [f"- {key}: {value}" for key, value in {**self.settings, **self.machine}.items()]
        return "\n".join(lines)


# Clocks


def timed(run: Callable[[], Facts], device: torch.device) -> tuple[float, float, Facts]:
    """Seconds on the device's clock, seconds on the wall, and what the run returned."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        start.record()
        facts = run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000, time.perf_counter() - wall, facts
    wall, cpu = time.perf_counter(), time.process_time()
    facts = run()
    return time.process_time() - cpu, time.perf_counter() - wall, facts


# Identity of a measurement


def digest(value: Any) -> str:
    """Short hash of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest() -> str:
    """Short hash of the code that is measured and that measures."""
    package, own = Path(axolotl_skd.__file__).parent, Path(__file__).parent
    files = sorted({*package.rglob("*.py"), *own.glob("*.py")})
    return digest([(path.name, path.read_text()) for path in files])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, nothing that names the machine."""
    versions = {}
    for package in ("torch", "transformers", "trl", "axolotl", "liger-kernel"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def require_equal(measured: Mapping[str, Measurement], fact: str) -> None:
    """Every contender of a group says the same of itself.

    Raises:
        AssertionError: two of them differ.
    """
    values = {name: m.facts[fact] for name, m in measured.items()}
    first = next(iter(values), None)
    for name, value in values.items():
        if value != values[first]:
            raise AssertionError(
                f"{fact} of {name!r} is {value}, but of {first!r} it is {values[first]}: they do "
                "not compute the same, so their times must not be compared"
            )


def require_close(measured: Mapping[str, Measurement], fact: str, tolerance: float) -> None:
    """Like `require_equal`, for numbers equal up to a relative tolerance."""
    values = {name: m.facts[fact] for name, m in measured.items()}
    first = next(iter(values), None)
    for name, value in values.items():
        if not abs(value - values[first]) <= tolerance * max(abs(values[first]), 1e-6):
            raise AssertionError(
                f"{fact} of {name!r} is {value}, but of {first!r} it is {values[first]} (relative "
                f"tolerance {tolerance}): their times must not be compared"
            )


# Tables and arguments


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits, None as a dash."""
    lines = [list(header), ["---"] * len(header), *([_text(value) for value in r] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def goal_table(goals: Sequence[Goal]) -> str:
    rows = [
        [g.text, f"{'<=' if g.at_most else '>='} {g.bound:g}", g.measured, _verdict(g)]
        for g in goals
    ]
    return markdown_table(["goal", "bound", "measured", ""], rows)


def _verdict(goal: Goal) -> str:
    return "met" if goal.met else "**missed**"


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write results here, and go on from here")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few cells, no goals")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser


def start(args: argparse.Namespace) -> torch.device:
    """Apply the common arguments; a GPU is used where there is one."""
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
