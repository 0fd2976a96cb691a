"""Evaluation results of a training run: the file that keeps them and the table that shows them.

`eval_results.json` holds `{"start": {task: {metric: value}}, "end": {...}}`; either may be missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

TaskMetrics = dict[str, dict[str, float]]

_STDERR = "_stderr"
# Shares of the rows in [0, 1], shown in percent. Every other metric is shown as it is.
_SHARES = re.compile(r"acc(_.+)?|has_answer")
_HEADER = ("task", "metric", "before", "after", "change")


def read_results(path: Path) -> dict[str, TaskMetrics]:
    """What is recorded at `path`; empty if the file does not exist.

    Raises:
        ValueError: if the file is no JSON object.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away and run again") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} holds no JSON object; move it away and run again")
    return recorded


def record(path: Path, stage: Literal["start", "end"], results: TaskMetrics) -> None:
    """Merge the results of one stage into the file at `path`, atomically.

    Tasks recorded before stay, a task that is recorded again is replaced. Not for several writers
    at once.

    Args:
        path: usually `<output_dir>/eval_results.json`; folders are made.
        stage: before or after training.
        results: `{task: {metric: value}}` as `run_tasks` returns it.

    Raises:
        ValueError: if there is a file that is no JSON object.
    """
    recorded = read_results(path)
    merged = {**recorded, stage: {**recorded.get(stage, {}), **results}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def comparison_table(results: Mapping[str, TaskMetrics]) -> str:
    """Before and after training, as an aligned text table of one row per task and metric.

    Shares (`acc`, `acc_algebra`) are in percent with one decimal, followed by `+-` one standard
    error where known; their change is in percentage points. A missing value is a `-`.

    Args:
        results: as `read_results` returns it.
    """
    rows = [_HEADER, *_rows(results.get("start", {}), results.get("end", {}))]
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
