from __future__ import annotations

from pathlib import Path

import pytest

from axolotl_skd.evaluation import tasks


def test_the_bundled_task_is_known() -> None:
    assert "skd_tiny_arithmetic" in tasks.available_tasks()
    tasks.check_tasks(["skd_tiny_arithmetic"])


def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="'skd_tiny_arithmetics' .did you mean 'skd_tiny_arith"):
        tasks.check_tasks(["skd_tiny_arithmetic", "skd_tiny_arithmetics"])


def test_each_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="tasks: 'mmlu'; 'zzz'. Available: .*skd_tiny_arithmetic"):
        tasks.check_tasks(["mmlu", "zzz"])


def test_names_are_read_without_resolving_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "resource_path", lambda name: tmp_path)
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "b.yaml").write_text("task: b\ncustom_dataset: !function gone.load\n")
    (tmp_path / "a.yaml").write_text("task: a\n")
    (tmp_path / "group.yaml").write_text("group: g\ntask: [a, b]\n")
    (tmp_path / "empty.yaml").touch()
    assert tasks.available_tasks() == ["a", "b", "g"]


def test_groups_are_taken_apart_each_task_once() -> None:
    held_out = ["skd_math", "skd_gsm_plus", "skd_asdiv", "skd_svamp"]
    assert tasks.leaf_tasks(["skd_svamp", "skd_math_heldout"]) == ["skd_svamp", *held_out[:3]]
    assert tasks.leaf_tasks(["skd_paper"]) == [
        "skd_gsm8k",
        *held_out,
        "skd_dialogsum",
        "skd_flores_asm_eng",
    ]
    with pytest.raises(ValueError, match="skd_papers"):
        tasks.leaf_tasks(["skd_papers"])
