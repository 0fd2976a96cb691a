"""What `skd_flores_asm_eng.yaml` calls."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from axolotl_skd.evaluation import scoring
from axolotl_skd.evaluation.benchmarks import load_benchmark
from axolotl_skd.evaluation.scoring import mean_chrf, mean_comet

__all__ = ["load", "mean_chrf", "mean_comet", "process_results"]


def load(**_: Any) -> dict[str, Dataset]:
    """The devtest sentences, whatever lm-eval passes on."""
    scoring.warn_without_comet()
    return {"test": Dataset.from_list(load_benchmark("flores_asm_eng"))}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, scoring.Translation]:
    """One row of the corpus that chrF and COMET are computed on."""
    return scoring.score_translation(doc, results[0])
