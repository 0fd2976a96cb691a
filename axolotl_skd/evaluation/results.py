"""Evaluation results of a training run: the files that keep them and the tables that show them.

`eval_results.json` holds `{"start": {task: {metric: value}}, "end": {...}}`; either may be missing.
Beside it `eval_settings.json` holds `{"start": {task: {setting: value}}, "end": {...}}`: what each
result was made with, so that none is taken for another's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

RESULTS_FILE = "eval_results.json"
_SETTINGS_FILE = "eval_settings.json"

Stage = Literal["start", "end"]
TaskMetrics = dict[str, dict[str, float]]
# What a result depends on; comparable with `==` after a round trip through JSON.
TaskSettings = dict[str, str | int | float | bool | None]

_STDERR = "_stderr"
# Shares of the rows in [0, 1], shown in percent. Every other metric is shown as it is.
_SHARES = re.compile(r"acc(_.+)?|has_answer")
_HEADER = ("task", "metric", "before", "after", "change")
# Differ by nature between before and after.
_OF_THE_MODEL = frozenset({"model", "revision", "adapter"})


def read_results(path: Path) -> dict[str, TaskMetrics]:
    """What is recorded at `path`; empty if the file does not exist.

    Raises:
        ValueError: if the file is no JSON object.
    """
    return _read(path)


def record(
    path: Path,
    stage: Stage,
    results: TaskMetrics,
    settings: TaskSettings,
    tasks: Iterable[str] = (),
) -> None:
    """Merge the results of one stage into the file at `path`, and their settings beside it.

    Tasks recorded before stay, a task that is recorded again is replaced. Each file is replaced as a
    whole, and a result never stands beside settings that are not its own. Not for several writers at
    once.

    Args:
        path: usually `<output_dir>/eval_results.json`; folders are made.
        stage: before or after training.
        results: `{task: {metric: value}}` as `run_tasks` returns it.
        settings: what the results were made with.
        tasks: what was asked for; a group without a number of its own is not in `results`.

    Raises:
        ValueError: if there is a file that is no JSON object.
    """
    done = {*tasks, *results}
    beside = path.with_name(_SETTINGS_FILE)
    recorded, made_with = _read(path), _read(beside)
    others = {key: value for key, value in made_with.get(stage, {}).items() if key not in done}
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(beside, {**made_with, stage: others})
    _replace(path, {**recorded, stage: {**recorded.get(stage, {}), **results}})
    _replace(beside, {**made_with, stage: {**others, **dict.fromkeys(sorted(done), settings)}})


def forget(path: Path) -> None:
    """Remove the results at `path`, those of an earlier run, and their settings."""
    path.unlink(missing_ok=True)
    path.with_name(_SETTINGS_FILE).unlink(missing_ok=True)


def recorded_with(path: Path, stage: Stage, settings: TaskSettings) -> set[str]:
    """The tasks and groups whose results of a stage were made with exactly these settings.

    Raises:
        ValueError: if there is a file that is no JSON object.
    """
    if stage not in _read(path):
        return set()
    made_with = _read(path.with_name(_SETTINGS_FILE)).get(stage, {})
    return {task for task, used in made_with.items() if used == settings}


def _read(path: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away and run again") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} holds no JSON object; move it away and run again")
    return recorded


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def recorded_table(path: Path) -> str:
    """`comparison_table` of what is recorded at `path`, with a line for each unfair comparison.

    Raises:
        ValueError: if there is a file that is no JSON object.
    """
    return "\n".join([comparison_table(read_results(path)), *_unlike(path)])


def _unlike(path: Path) -> Iterator[str]:
    """Tasks that were run differently before and after."""
    made_with = _read(path.with_name(_SETTINGS_FILE))
    start, end = made_with.get("start", {}), made_with.get("end", {})
    for task in sorted(start.keys() & end.keys() & read_results(path).get("end", {}).keys()):
        names = sorted((start[task].keys() | end[task].keys()) - _OF_THE_MODEL)
        differing = [
            f"{name} {start[task].get(name)} before, {end[task].get(name)} after"
            for name in names
            if start[task].get(name) != end[task].get(name)
        ]
        if differing:
            yield f"not comparable: {task} was run with {'; '.join(differing)}"


def results_table(results: TaskMetrics) -> str:
    """The results of one model, as an aligned text table of one row per task and metric."""
    rows = [
        (task, metric, _value(metric, metrics))
        for task, metrics in results.items()
        for metric in metrics
        if not metric.endswith(_STDERR)
    ]
    return _aligned([("task", "metric", "value"), *rows])


def comparison_table(results: Mapping[str, TaskMetrics]) -> str:
    """Before and after training, as an aligned text table of one row per task and metric.

    Shares (`acc`, `acc_algebra`) are in percent with one decimal, followed by `+-` one standard
    error where known; their change is in percentage points. A missing value is a `-`.

    Args:
        results: as `read_results` returns it.
    """
    return _aligned([_HEADER, *_rows(results.get("start", {}), results.get("end", {}))])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _rows(start: TaskMetrics, end: TaskMetrics) -> Iterator[tuple[str, ...]]:
    for task in dict.fromkeys([*start, *end]):
        before, after = start.get(task, {}), end.get(task, {})
        for metric in dict.fromkeys([*before, *after]):
            if not metric.endswith(_STDERR):
                cells = _value(metric, before), _value(metric, after)
                yield task, metric, *cells, _change(metric, before, after)


def _value(metric: str, metrics: Mapping[str, float]) -> str:
    if metric not in metrics:
        return "-"
    share = bool(_SHARES.fullmatch(metric))
    scale = 100 if share else 1
    decimals = 1 if share else 2
    text = f"{scale * metrics[metric]:.{decimals}f}{'%' if share else ''}"
    stderr = metrics.get(metric + _STDERR)
    return text if stderr is None else f"{text} +- {scale * stderr:.{decimals}f}"


def _change(metric: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if metric not in before or metric not in after:
        return "-"
    change = after[metric] - before[metric]
    return f"{100 * change:+.1f}" if _SHARES.fullmatch(metric) else f"{change:+.2f}"
