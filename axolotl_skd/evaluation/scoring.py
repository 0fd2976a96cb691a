"""What the task YAMLs do with a model's output: extract, score, and average over the rows.

Every row yields all metrics of its task in the same order, None where one is not for it: lm-eval
gathers metrics from several processes one by one and would mix them up otherwise.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from axolotl_skd.evaluation.benchmarks import BREAKDOWNS
from axolotl_skd.evaluation.chrf import corpus_chrf
from axolotl_skd.evaluation.comet import CometUnavailableError, comet_scores
from axolotl_skd.evaluation.data_sources import Row
from axolotl_skd.evaluation.grading import grade
from axolotl_skd.evaluation.rouge import rouge_scores

LOG = logging.getLogger(__name__)

# Source, translation and reference of one sentence.
Translation = tuple[str, str, str]


def extract_all(
    extract: Callable[[str], str | None], responses: Sequence[Sequence[str]]
) -> list[str]:
    """The answer in the first response to each row; empty = it has none.

    As an lm-eval filter, so that `--log_samples` holds the extracted answers (`filtered_resps`).
    There a None would become the text "None", which is an answer in GSM-Plus.
    """
    return [extract(row[0]) or "" for row in responses]


def score_answer(row: Row, answer: str) -> dict[str, float | None]:
    """Metrics of one extracted answer: `acc`, `has_answer` and the benchmark's breakdown.

    Args:
        row: of `load_benchmark`, with `answer`, `benchmark` and `breakdown`.
        answer: what the model answered; empty = nothing, which is wrong.
    """
    right = float(grade(row["answer"], answer))
    return {
        "acc": right,
        "has_answer": float(bool(answer)),
        **{
            metric: right if metric in row["breakdown"] else None
            for metric in BREAKDOWNS[row["benchmark"]]
        },
    }


def mean_of_known(values: Sequence[float | None]) -> float:
    """The mean of the rows that a metric is for; NaN if there are none, e.g. under a limit."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def score_summary(row: Row, summary: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 x 100 of one summary, each the mean over the row's `summaries`."""
    return rouge_scores(summary.strip(), row["summaries"])


def score_translation(row: Row, translation: str) -> dict[str, Translation]:
    """What the corpus metrics `chrf` and `comet` need of one row."""
    triple = row["source"], translation.strip(), row["reference"]
    return {"chrf": triple, "comet": triple}


def mean_chrf(triples: Sequence[Translation]) -> float:
    """chrF of the whole corpus, in [0, 100]."""
    return corpus_chrf([item[1] for item in triples], [[item[2]] for item in triples])


def mean_comet(triples: Sequence[Translation]) -> float:
    """Mean COMET x 100; NaN, with the reason as an error in the log, if it cannot be computed.

    It comes after all sentences are translated, when nothing may throw the work away: what could not
    be scored is written to files, and the log says how to score them later.
    """
    columns = [list(column) for column in zip(*triples, strict=True)]
    try:
        scores = comet_scores(*columns)
    except CometUnavailableError as error:
        LOG.error("COMET is NaN: %s\n%s", error, _kept_for_later(*columns))
    except Exception:  # whatever failed, the translations must outlive it
        LOG.exception("COMET is NaN, because it failed. %s", _kept_for_later(*columns))
    else:
        return sum(scores) / len(scores)
    return math.nan


def _kept_for_later(sources: list[str], translations: list[str], references: list[str]) -> str:
    """Write the texts, one a line, to files of a new folder; how to score them."""
    folder = Path(tempfile.mkdtemp(prefix="skd_comet_"))
    named = {"translations": translations, "references": references, "sources": sources}
    for name, texts in named.items():
        lines = (" ".join(text.split()) + "\n" for text in texts)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    files = " ".join(str(folder / name) for name in named)
    return f"Once that is mended: axolotl skd score --metric comet {files}"


def warn_without_comet() -> None:
    """Say before the first sentence is translated that COMET will be missing, if so."""
    try:
        comet_scores([], [], [])
    except CometUnavailableError as error:
        LOG.warning("COMET will be NaN (chrF is computed): %s", error)
