from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from axolotl_skd.evaluation.results import (
    comparison_table,
    forget,
    read_results,
    record,
    recorded_table,
    recorded_with,
    results_table,
)

START = {"arith": {"acc": 0.12, "acc_stderr": 0.014, "has_answer": 0.5, "rouge_l": 20.0}}
SETTINGS = {"model": "m", "limit": None, "backend": "hf"}
END = {"arith": {"acc": 0.454, "acc_stderr": 0.0223, "has_answer": 0.998, "rouge_l": 18.75}}


def test_both_stages_end_up_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "outputs" / "eval_results.json"
    assert read_results(path) == {}
    record(path, "start", START, SETTINGS)
    record(path, "end", END, SETTINGS)
    assert read_results(path) == {"start": START, "end": END}
    assert sorted(path.parent.iterdir()) == [path, path.with_name("eval_settings.json")]
    forget(path)
    assert list(path.parent.iterdir()) == []
    forget(path)


def test_a_task_recorded_again_is_replaced_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.json"
    record(path, "end", {"a": {"acc": 0.1, "old": 1.0}, "b": {"acc": 0.2}}, SETTINGS)
    record(path, "end", {"a": {"acc": 0.3}}, SETTINGS)
    assert read_results(path) == {"end": {"a": {"acc": 0.3}, "b": {"acc": 0.2}}}


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_broken_file_is_named_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "eval_results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="eval_results.json.*move it away"):
        record(path, "end", END, SETTINGS)
    assert path.read_text() == content


def test_the_table() -> None:
    assert comparison_table({"start": START, "end": END}).splitlines() == [
        "task   metric      before        after         change",
        "arith  acc         12.0% +- 1.4  45.4% +- 2.2  +33.4",
        "arith  has_answer  50.0%         99.8%         +49.8",
        "arith  rouge_l     20.00         18.75         -1.25",
    ]


def test_the_shares_of_a_breakdown_are_in_percent_too() -> None:
    results = {"start": {"t": {"acc_algebra": 0.5}}, "end": {"t": {"acc_algebra": 0.75}}}
    assert cells(results) == [["t", "acc_algebra", "50.0%", "75.0%", "+25.0"]]


def cells(results: dict) -> list[list[str]]:
    return [line.split() for line in comparison_table(results).splitlines()[1:]]


def test_a_missing_stage_is_a_dash() -> None:
    assert cells({"end": END})[0] == ["arith", "acc", "-", "45.4%", "+-", "2.2", "-"]
    assert cells({"start": START})[1] == ["arith", "has_answer", "50.0%", "-", "-"]
    assert cells({}) == []


def test_a_task_or_metric_of_one_stage_only() -> None:
    assert cells({"start": {"a": {"acc": 0.5}}, "end": {"b": {"acc": 1.0}}}) == [
        ["a", "acc", "50.0%", "-", "-"],
        ["b", "acc", "-", "100.0%", "-"],
    ]


def test_results_are_those_of_their_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.json"
    assert recorded_with(path, "start", SETTINGS) == set()
    record(path, "start", {"a": {"acc": 0.1}}, SETTINGS, tasks=["a", "group"])
    other = {**SETTINGS, "limit": 5}
    record(path, "start", {"b": {"acc": 0.2}}, other)
    assert recorded_with(path, "start", SETTINGS) == {"a", "group"}
    assert recorded_with(path, "start", other) == {"b"}
    assert recorded_with(path, "end", SETTINGS) == set()
    record(path, "start", {"a": {"acc": 0.1}}, other)
    assert recorded_with(path, "start", SETTINGS) == {"group"}


def test_settings_without_results_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.json"
    record(path, "start", START, SETTINGS)
    path.unlink()
    assert recorded_with(path, "start", SETTINGS) == set()


def test_an_interruption_leaves_no_result_beside_foreign_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "eval_results.json"
    record(path, "start", {"a": {"acc": 0.1}}, SETTINGS)
    for allowed in range(3):
        writes = iter(range(allowed))
        replace = os.replace

        def interrupted(
            *names: str, writes: Iterator[int] = writes, replace: Any = replace
        ) -> None:
            if next(writes, None) is None:
                raise KeyboardInterrupt
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                record(path, "start", {"a": {"acc": 0.9}}, {**SETTINGS, "limit": 5})
        if recorded_with(path, "start", SETTINGS):
            assert read_results(path)["start"]["a"] == {"acc": 0.1}
        assert not recorded_with(path, "start", {**SETTINGS, "limit": 5})


def test_an_unfair_comparison_is_named(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.json"
    record(path, "start", START, SETTINGS)
    record(path, "end", END, {**SETTINGS, "model": "trained"})
    assert recorded_table(path) == comparison_table({"start": START, "end": END})
    record(path, "end", END, {**SETTINGS, "model": "trained", "limit": 5})
    assert recorded_table(path).splitlines()[-1] == (
        "not comparable: arith was run with limit None before, 5 after"
    )


def test_the_table_of_one_model() -> None:
    assert results_table(START).splitlines() == [
        "task   metric      value",
        "arith  acc         12.0% +- 1.4",
        "arith  has_answer  50.0%",
        "arith  rouge_l     20.00",
    ]
