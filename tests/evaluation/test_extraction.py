from __future__ import annotations

import time

import pytest

from axolotl_skd.evaluation.extraction import extract_boxed, extract_hash


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("40 + 2 = 42\n#### 42", "42"),
        ("####42", "42"),
        ("#### -1,250 \r\nand more", "-1,250"),
        ("so #### 1\n#### 2", "1"),
        ("####\n42", None),
        ("####   ", None),
        ("### 42", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_extract_hash(text: str, answer: str | None) -> None:
    assert extract_hash(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\fbox{42}", "42"),
        (r"\boxed {42}", "42"),
        ("\\boxed{\n42\n}", "42"),
        (r"$$\boxed{ 1{,}250 }$$", "1{,}250"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and so on}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{1} no, \fbox{2}", "2"),
        (r"\boxed{Your Answer} is asked for: \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ \fbox{ \boxed{5} } }", "5"),
        (r"\boxed{1} \boxed{\boxed{5}+x}", r"\boxed{5}+x"),
        # Cut short: what is closed counts.
        (r"\boxed{1} no, \boxed{2", "1"),
        (r"\boxed{x = \boxed{5}", "5"),
        (r"\boxed{x^{2}", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        (r"\boxed{1} \boxed{ }", None),
        (r"\boxed 5", None),
        (r"\boxedtext{5}", None),
        ("boxed{5}", None),
        ("{5}", None),
        ("}}}", None),
        ("5", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{" * 50_000, None),
        (r"\boxed{" * 50_000 + "5" + "}" * 50_000, "5"),
        ("{" * 500_000, None),
        ("\\" * 500_000, None),
        (r"\boxed" + " " * 500_000, None),
        ("####" * 100_000, None),
    ],
)
def test_hostile_text_takes_linear_time(text: str, answer: str | None) -> None:
    started = time.monotonic()
    assert extract_boxed(text) == answer
    extract_hash(text)
    assert time.monotonic() - started < 5
