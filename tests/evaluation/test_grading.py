from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from axolotl_skd.evaluation import grading
from axolotl_skd.evaluation.grading import grade, same_integer
from axolotl_skd.evaluation.grading_process import GradingProcess
from tests.evaluation.graded_pairs import RIGHT, WRONG, Pairs


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("42", "42"),
        ("42", " 42. "),
        ("42", "+42"),
        ("42", "$42"),
        ("42", "0042"),
        ("-42", "-$42"),
        ("-42", "$-42"),
        ("1250", "1,250"),
        ("1,234,567", "1234567"),
        ("0", "-0"),
        ("9" * 10_000, "9" * 10_000),
    ],
)
def test_the_same_integer_is_right(gold: str, prediction: str) -> None:
    assert same_integer(gold, prediction)


@pytest.mark.parametrize(
    "prediction",
    [
        None,
        "",
        "-42",
        "43",
        "42 apples",
        "42.0",
        "42..",
        "4,2",
        "42,",
        "4 2",
        "--42",
        "$$42",
        "-$-42",
        "42%",
        "x = 42",
        "0x2a",
        "4_2",
        "٤٢",
        "４２",
        "42\n42",
        "9" * 10_000,
        "-" * 100_000,
        "1,111" * 100_000,
        "\x00",
    ],
)
def test_anything_else_is_wrong(prediction: str | None) -> None:
    assert not same_integer("42", prediction)


def test_two_texts_that_are_no_integers_are_not_equal() -> None:
    assert not same_integer("forty-two", "forty-two")


def cases(table: Pairs) -> Iterator[object]:
    for subject, pairs in table.items():
        for number, pair in enumerate(pairs):
            yield pytest.param(*pair, id=f"{subject} {number}")


@pytest.mark.parametrize(("gold", "prediction"), cases(RIGHT))
def test_what_means_the_same_is_right(gold: str, prediction: str) -> None:
    assert grade(gold, prediction)


@pytest.mark.parametrize(("gold", "prediction"), cases(WRONG))
def test_what_only_looks_alike_is_wrong(gold: str, prediction: str) -> None:
    assert not grade(gold, prediction)


@pytest.mark.parametrize("gold", sorted({gold for pairs in RIGHT.values() for gold, _ in pairs}))
def test_every_reference_is_right_about_itself(gold: str) -> None:
    assert grade(gold, gold)
    assert grade(gold, rf" \({gold}\). ")
    assert not grade(gold, None)
    assert not grade(gold, "")


def test_no_answer_to_no_reference_is_not_right() -> None:
    assert not grade("", "")
    assert not grade(" ", " ")


@pytest.fixture(scope="module")
def hurried_process() -> Iterator[GradingProcess]:
    """With little time, so that the tests need little."""
    process = GradingProcess(seconds=0.5)
    yield process
    process.close()


@pytest.fixture
def hurried(hurried_process: GradingProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "SHARED", hurried_process)


CONTROL = "".join(map(chr, range(32)))
HOSTILE = {
    "10,000 braces": "{" * 10_000,
    "10,000 pairs of braces": "{" * 10_000 + "5" + "}" * 10_000,
    "1,000 boxes": r"\boxed{" * 1000 + "5" + "}" * 1000,
    "open boxes": r"\boxed{" * 1000,
    "1 MB": "5 " * 500_000,
    "1 MB of digits": "5" * 1_000_000,
    "control characters": CONTROL * 10 + "6",
    "a lone surrogate": "\ud800 6",
    "a tower": "9**9**9",
    "a LaTeX tower": "9^{9^{9}}",
    "a tower with brackets": "(9^9)^(9^9)",
    "a long exponent": "9^" + "9" * 500,
    "E notation": "1e999999999",
    "a factorial": "(99999999)!",
    "factorials": "9!!!!!!",
    "a binomial": r"\binom{10^{9}}{10^{8}}",
    "a sum": r"\sum_{i=1}^{10^9} i^i",
    "a product": r"\prod_{i=1}^{99999999} i",
    "an integral": r"\int_0^1 e^{-x^2 \sin(x^{\sin x})} dx",
    "a polynomial": "(x+y+z+w)^{900}",
    "signs": r"\pm" * 200 + "6",
    "commas": "6," * 400,
    "spaces": "6" + " " * 900 + "7",
    "units": "6 " + "cm " * 300,
    "equals": "=" * 900,
    "dollars": "$" * 901,
    "asterisks": "**" * 450,
    "code": "__import__('pathlib').Path('PWNED').touch()",
    "LaTeX code": r"\input{/etc/passwd} \write18{touch PWNED}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_in_no_time_and_nothing_runs(
    hurried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    assert not grade("x+1", HOSTILE[name])
    assert not grade(HOSTILE[name], "5")
    assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("10,000 braces", "10,000 pairs of braces", "1,000 boxes", "1 MB", "1 MB of digits"),
        *("a tower", "a LaTeX tower", "a long exponent", "a factorial"),
    ],
)
def test_the_plainly_hostile_is_not_even_tried(name: str) -> None:
    assert not grading._is_reasonable(HOSTILE[name])


def test_what_takes_too_long_is_wrong_with_a_warning(
    hurried: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert not grade("x+y", HOSTILE["a polynomial"])
    assert "no verdict" in caplog.text and "(x+y+z+w)^{900}" in caplog.text
    # The next pair has a new process.
    assert grade("2x", "x+x")


def test_no_reference_answer_is_taken_for_hostile() -> None:
    assert all(
        grading._is_reasonable(text) for pairs in RIGHT.values() for pair in pairs for text in pair
    )
