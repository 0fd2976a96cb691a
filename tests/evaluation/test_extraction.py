from __future__ import annotations

import pytest

from axolotl_skd.evaluation.extraction import extract_hash


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
