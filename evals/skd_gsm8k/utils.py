"""What `skd_gsm8k.yaml` calls."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from axolotl_skd.evaluation import scoring
from axolotl_skd.evaluation.benchmarks import load_benchmark
from axolotl_skd.evaluation.extraction import extract_hash


def load(**_: Any) -> dict[str, Dataset]:
    """The test rows, whatever lm-eval passes on."""
    return {"test": Dataset.from_list(load_benchmark("gsm8k"))}


def extract(responses: list[list[str]], _: Any) -> list[str]:
    """The answers behind the first `####`; empty = none."""
    return scoring.extract_all(extract_hash, responses)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float | None]:
    """Metrics of one row's extracted answer."""
    return scoring.score_answer(doc, results[0])
