"""Prompts from files and tasks, and their rendering."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from axolotl_skd.draft_report.errors import DraftReportError
from axolotl_skd.draft_report.prompts import read_prompt_file, read_task, render
from axolotl_skd.resources import resource_path
from tests.helpers import save_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}


def rows_file(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_turn_of_the_assistant_is_left_out(tmp_path: Path) -> None:
    path = rows_file(
        tmp_path / "a.jsonl",
        {"messages": [SYSTEM, USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT, {**USER, "name": "x"}], "id": 3},
    )
    assert read_prompt_file(path) == [[SYSTEM, USER], [USER, ASSISTANT, USER]]
    assert read_prompt_file(path, limit=1) == [[SYSTEM, USER]]


def test_lines_of_text_are_user_turns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('One?\n\n{"two": 2}\n')
    assert read_prompt_file(path) == [
        [{"role": "user", "content": "One?"}],
        [{"role": "user", "content": '{"two": 2}'}],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"row 2 .*keys \['question'\].*to-chat"),
        ({"messages": [{"from": "human"}]}, "row 2"),
        ({"messages": [ASSISTANT]}, "row 2.*no turn before"),
        ({"messages": []}, "row 2.*no turn before"),
        ([1], "row 2"),
    ],
)
def test_rows_that_are_no_chat_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = rows_file(tmp_path / "a.jsonl", {"messages": [USER]}, row)
    with pytest.raises(DraftReportError, match=message):
        read_prompt_file(path)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.txt", "\n  \n")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DraftReportError, match="--prompts: .* holds no prompt"):
        read_prompt_file(tmp_path / name)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DraftReportError, match="--prompts: .*a.jsonl cannot be read"):
        read_prompt_file(tmp_path / "a.jsonl")


def test_a_tasks_questions() -> None:
    path = resource_path("evals") / "skd_tiny_arithmetic" / "test.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    conversations = read_task("skd_tiny_arithmetic", limit=3)
    assert len(conversations) == 3
    assert conversations[0] == [{"role": "user", "content": first["question"]}]


def test_a_task_wraps_its_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows_file(tmp_path / "gsm8k" / "test.jsonl", {"question": "1+1?", "answer": "2\n#### 2"})
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    assert read_task("skd_gsm8k") == [[{"role": "user", "content": "Q: 1+1? \n\nA:"}]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skd_tiny_arithmetics", "--task: unknown.*did you mean 'skd_tiny_arithmetic'"),
        ("skd_paper", "--task: skd_paper is a group"),
    ],
)
def test_tasks_that_cannot_be_prompts(name: str, message: str) -> None:
    with pytest.raises(DraftReportError, match=message):
        read_task(name)


def test_a_task_without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    with pytest.raises(DraftReportError, match="--task: skd_gsm8k cannot be loaded.*SKD_DATA_DIR"):
        read_task("skd_gsm8k")


def test_rendering_ends_where_the_answer_begins() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resource_path("example_configs") / "tiny" / "student")
    (ids,) = render([[USER]], tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    (ids,) = render([[USER]], tokenizer, "{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    assert tokenizer.decode(ids) == "Why?!"


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DraftReportError, match="chat_template:"):
        render([[USER]], save_tokenizer(tmp_path))
