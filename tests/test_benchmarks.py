"""The benchmarks' quick forms run, say what they measured and resume; no time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "evals" / "benchmarks"
CPU = torch.device("cpu")


def _load(name: str) -> ModuleType:
    """A module of the benchmarks under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


harness = _load("harness")


# Commands


def run_quick(script: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"evals/benchmarks/{script}.py", "--quick", *arguments, "--json", path],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "main()" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_form_measures_and_resumes(script: str, folder: Path) -> None:
    path = folder / f"{script}.json"
    output = run_quick(script, path).stdout
    first = json.loads(path.read_text())
    assert first["benchmark"] == script
    assert {"cpu", "cores", "threads", "torch", "transformers", "trl"} <= first["machine"].keys()
    assert first["cells"]
    for name, cell in first["cells"].items():
        seconds = cell["seconds"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"], name
        assert len(seconds["runs"]) == len(cell["wall_seconds"]) == 1, name
        assert seconds["spread"] == 0, name
    assert "| --- |" in output

    again = run_quick(script, path)
    assert json.loads(path.read_text())["cells"] == first["cells"]  # not one measured again
    assert again.stdout == output


def test_profile_says_where_a_step_goes(folder: Path) -> None:
    path = folder / "profile.json"
    run_quick("training_step", path, "--profile")
    (phases,) = json.loads(path.read_text())["profile"].values()
    for expected in (
        "rollout: student decoding",
        "rollout: teacher verification",
        "rollout: sampling",
        "student backward",
        "loss through the heads",
        "optimizer",
    ):
        assert phases[expected] > 0


def test_contenders_that_differ_are_refused() -> None:
    one, other = ({"a": harness.Measurement((1.0,), (1.0,), {"loss": x})} for x in (2.0, 2.001))
    both = {"one": one["a"], "other": other["a"]}
    harness.require_close(both, "loss", 1e-3)
    with pytest.raises(AssertionError, match="must not be compared"):
        harness.require_close(both, "loss", 1e-4)
    with pytest.raises(AssertionError, match="'other' is 2.001"):
        harness.require_equal(both, "loss")


# Harness


class Log:
    """Cells that note their runs."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def cell(self, name: str, **keywords: Any) -> Any:
        def run() -> dict[str, Any]:
            self.runs.append(name)
            return {"tokens": 1}

        return harness.Cell(name, run, **keywords)


def bench(path: Path | None, repeats: int = 2, **settings: Any) -> Any:
    return harness.Benchmark("test", settings, CPU, repeats, path)


def test_repeats_are_interleaved() -> None:
    log = Log()
    cells = [log.cell("a"), log.cell("b"), log.cell("slow", repeats=1)]
    measured = bench(None).measure(cells)
    assert log.runs == ["a", "b", "slow", "a", "b"]
    assert [len(m.seconds) for m in measured.values()] == [2, 2, 1]


def test_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    path, log = tmp_path / "r.json", Log()

    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(path).measure([log.cell("a"), harness.Cell("b", interrupted)])
    log.runs.clear()
    measured = bench(path).measure([log.cell("a"), log.cell("b")])
    assert log.runs == ["b", "a", "b"]  # the first run of `a` was kept
    assert all(len(m.seconds) == 2 for m in measured.values())


@pytest.mark.parametrize(
    "change", ["benchmark settings", "cell settings", "repeats", "machine", "code", None]
)
def test_measures_again_what_was_measured_otherwise(
    tmp_path: Path, change: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "r.json", Log()
    bench(path, batch=1).measure([log.cell("a", settings={"x": 1})])
    log.runs.clear()
    if change == "machine":
        monkeypatch.setattr(harness, "describe_machine", lambda _device: {"cpu": "another"})
    if change == "code":
        monkeypatch.setattr(harness, "code_digest", lambda: "another")
    again = bench(
        path,
        repeats=3 if change == "repeats" else 2,
        batch=2 if change == "benchmark settings" else 1,
    )
    again.measure([log.cell("a", settings={"x": 2 if change == "cell settings" else 1})])
    assert len(log.runs) == {"repeats": 3, None: 0}.get(change, 2)
    assert len(json.loads(path.read_text())["cells"]["a"]["seconds"]["runs"]) == again.repeats


def test_preparation_is_not_timed() -> None:
    import time

    def busy() -> None:
        start = time.process_time()
        while time.process_time() - start < 0.05:
            pass

    log = Log()
    (measured,) = bench(None, repeats=1).measure([log.cell("a", prepare=busy)]).values()
    assert measured.median < 0.04


def test_median_and_spread() -> None:
    measurement = harness.Measurement((4.0, 1.0, 2.0), (9.0, 9.0, 9.0), {})
    assert measurement.median == 2.0
    assert measurement.spread == 1.5
    assert measurement.as_json()["seconds"]["min"] == 1.0
    assert harness.Measurement.from_json(measurement.as_json()) == measurement


def test_tables() -> None:
    table = harness.markdown_table(["name", "value"], [["a", 1.23456], ["b", None], ["c", 4321.5]])
    assert table.splitlines() == [
        "| name | value |",
        "| --- | --- |",
        "| a | 1.23 |",
        "| b | - |",
        "| c | 4,322 |",
    ]
    goals = [harness.Goal("fast", 1.2, 1.1), harness.Goal("wide", 1.2, 1.1, at_most=False)]
    assert [goal.met for goal in goals] == [False, True]
    assert "| fast | <= 1.1 | 1.2 | **missed** |" in harness.goal_table(goals)


def test_the_machine_is_not_named() -> None:
    text = json.dumps(harness.describe_machine(CPU))
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
