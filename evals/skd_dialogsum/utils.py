"""What `skd_dialogsum.yaml` calls."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from axolotl_skd.evaluation import scoring
from axolotl_skd.evaluation.benchmarks import load_benchmark


def load(**_: Any) -> dict[str, Dataset]:
    """The test dialogues, whatever lm-eval passes on."""
    return {"test": Dataset.from_list(load_benchmark("dialogsum"))}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE of one summary."""
    return scoring.score_summary(doc, results[0])
