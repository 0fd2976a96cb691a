"""What the YAMLs of this folder call."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from axolotl_skd.evaluation import scoring
from axolotl_skd.evaluation.benchmarks import load_benchmark
from axolotl_skd.evaluation.extraction import extract_boxed
from axolotl_skd.evaluation.scoring import mean_of_known

__all__ = ["extract", "load", "mean_of_known", "process_results"]


def load(*, benchmark: str, **_: Any) -> dict[str, Dataset]:
    """The benchmark's rows, whatever else lm-eval passes on."""
    return {"test": Dataset.from_list(load_benchmark(benchmark))}


def extract(responses: list[list[str]], _: Any) -> list[str]:
    """The answers in the last boxes; empty = none."""
    return scoring.extract_all(extract_boxed, responses)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float | None]:
    """Metrics of one row's extracted answer."""
    return scoring.score_answer(doc, results[0])
