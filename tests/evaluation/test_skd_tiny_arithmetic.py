"""The task's own functions and data; lm-eval itself runs in `test_runner.py`."""

from __future__ import annotations

import runpy

import pytest

from axolotl_skd.evaluation.extraction import extract_hash
from axolotl_skd.evaluation.grading import same_integer
from axolotl_skd.resources import resource_path


@pytest.fixture(scope="module")
def utils() -> dict:
    return runpy.run_path(str(resource_path("evals") / "skd_tiny_arithmetic" / "utils.py"))


@pytest.mark.parametrize(
    ("completion", "acc", "has_answer"),
    [("6 * 7 = 42\n#### 42", 1, 1), ("#### 41", 0, 1), ("42", 0, 0), ("", 0, 0)],
)
def test_grading_of_one_row(utils: dict, completion: str, acc: float, has_answer: float) -> None:
    doc = {"question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"}
    extracted = utils["extract"]([[completion]], [doc])
    assert utils["process_results"](doc, extracted) == {"acc": acc, "has_answer": has_answer}


def test_a_reference_without_an_answer_is_an_error(utils: dict) -> None:
    with pytest.raises(ValueError, match="no '####'"):
        utils["process_results"]({"question": "?", "answer": "42"}, ["#### 42"])


def test_every_reference_is_an_integer_that_grades_itself_right(utils: dict) -> None:
    rows = utils["load"](pretrained="ignored")["test"]
    assert len(rows) == 500
    assert len(set(rows["question"])) == 500
    for row in rows:
        answer = extract_hash(row["answer"])
        assert answer is not None and same_integer(answer, answer)
