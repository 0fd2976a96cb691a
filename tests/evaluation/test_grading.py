from __future__ import annotations

import pytest

from axolotl_skd.evaluation.grading import same_integer


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
