"""Tokenised rows as Axolotl hands them over, for tests of the data path."""

from __future__ import annotations

from typing import Any

X = -100  # a label that is not trained
EOS = 9


def feature(prompt: list[int], completion: list[int], **more: Any) -> dict[str, Any]:
    return {
        "input_ids": prompt + completion,
        "labels": [X] * len(prompt) + completion,
        "attention_mask": [1] * len(prompt + completion),
        **more,
    }
