"""What `skd_tiny_arithmetic.yaml` calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from axolotl_skd.evaluation.extraction import extract_hash
from axolotl_skd.evaluation.grading import same_integer

_TEST = Path(__file__).with_name("test.jsonl")


def load(**_: Any) -> dict[str, Dataset]:
    """The rows `{"question", "answer"}` beside this file, whatever lm-eval passes on."""
    with _TEST.open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """One row's share of `acc` (right integer) and `has_answer` (there is a `####` answer)."""
    gold, prediction = extract_hash(doc["answer"]), extract_hash(results[0])
    if gold is None:
        raise ValueError(f"the reference answer has no '####': {doc['answer']!r}")
    return {
        "acc": float(same_integer(gold, prediction)),
        "has_answer": float(prediction is not None),
    }
