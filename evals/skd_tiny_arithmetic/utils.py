"""What `skd_tiny_arithmetic.yaml` calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from axolotl_skd.evaluation import scoring
from axolotl_skd.evaluation.extraction import extract_hash
from axolotl_skd.evaluation.grading import same_integer

_TEST = Path(__file__).with_name("test.jsonl")


def load(**_: Any) -> dict[str, Dataset]:
    """The rows `{"question", "answer"}` beside this file, whatever lm-eval passes on."""
    with _TEST.open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def extract(responses: list[list[str]], _: Any) -> list[str]:
    """The answers behind the first `####`; empty = none."""
    return scoring.extract_all(extract_hash, responses)


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """`acc` (the right integer) and `has_answer` (there is a `####` answer) of one row's extract."""
    gold, prediction = extract_hash(doc["answer"]), results[0]
    if gold is None:
        raise ValueError(f"the reference answer has no '####': {doc['answer']!r}")
    return {
        "acc": float(same_integer(gold, prediction)),
        "has_answer": float(bool(prediction)),
    }
