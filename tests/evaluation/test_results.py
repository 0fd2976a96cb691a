from __future__ import annotations

from pathlib import Path

import pytest

from axolotl_skd.evaluation.results import comparison_table, read_results, record

START = {"arith": {"acc": 0.12, "acc_stderr": 0.014, "has_answer": 0.5, "rouge_l": 20.0}}
END = {"arith": {"acc": 0.454, "acc_stderr": 0.0223, "has_answer": 0.998, "rouge_l": 18.75}}


def test_both_stages_end_up_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "outputs" / "eval_results.json"
    assert read_results(path) == {}
    record(path, "start", START)
    record(path, "end", END)
    assert read_results(path) == {"start": START, "end": END}
    assert list(path.parent.iterdir()) == [path]


def test_a_task_recorded_again_is_replaced_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.json"
    record(path, "end", {"a": {"acc": 0.1, "old": 1.0}, "b": {"acc": 0.2}})
    record(path, "end", {"a": {"acc": 0.3}})
    assert read_results(path) == {"end": {"a": {"acc": 0.3}, "b": {"acc": 0.2}}}


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_broken_file_is_named_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "eval_results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="eval_results.json.*move it away"):
        record(path, "end", END)
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
