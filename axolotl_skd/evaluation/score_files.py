"""Scoring text files, one segment a line: what `axolotl skd score` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_skd.evaluation.chrf import corpus_chrf, sentence_chrf
from axolotl_skd.evaluation.comet import comet_scores
from axolotl_skd.evaluation.rouge import rouge_scores

METRICS = ("rouge", "chrf", "comet")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileScores:
    """Scores of a file, all in hundredths.

    Attributes:
        metric: one of `METRICS`.
        segments: `{score name: value}` of each line.
        mean: the mean of each score over the lines.
        corpus: scores that are no mean over the lines but of the whole file; chrF has one.
    """

    metric: str
    segments: list[dict[str, float]]
    mean: dict[str, float]
    corpus: dict[str, float]


def score_files(
    metric: str, hypotheses: Path, others: Sequence[Path], **comet_options: Any
) -> FileScores:
    """Score the lines of a file.

    Args:
        metric: one of `METRICS`.
        hypotheses: the texts to score.
        others: for ROUGE and chrF one or more files of references; for COMET the references, then
            the sources.
        comet_options: keywords of `comet_scores`.

    Raises:
        ValueError: the files are not of one length (naming each length) or empty, are not UTF-8, are
            of the wrong number, or there are options that the metric does not have.
        CometUnavailableError, CometCheckpointError: as `comet_scores`.
        ImportError: the metric's package is not installed.
    """
    if metric == "comet" and len(others) != 2:
        raise ValueError(
            f"comet needs the hypotheses, one file of references and one of sources, in this order; "
            f"got {len(others)} files beside the hypotheses"
        )
    if metric != "comet" and comet_options:
        raise ValueError(f"{', '.join(comet_options)}: only comet has such an option, not {metric}")
    paths = [hypotheses, *others]
    predictions, *columns = [read_segments(path) for path in paths]
    lengths = [len(predictions), *map(len, columns)]
    if len(set(lengths)) > 1:
        counts = ", ".join(
            f"{path} has {count}" for path, count in zip(paths, lengths, strict=True)
        )
        raise ValueError(f"the files must have the same number of lines, but {counts}")
    if not predictions:
        raise ValueError(f"{hypotheses} is empty: there is nothing to score")
    segments, corpus = _score(metric, predictions, columns, comet_options)
    mean = {name: sum(row[name] for row in segments) / len(segments) for name in segments[0]}
    return FileScores(metric=metric, segments=segments, mean=mean, corpus=corpus)


def _score(
    metric: str,
    predictions: list[str],
    columns: list[list[str]],
    comet_options: dict[str, Any],
) -> tuple[list[dict[str, float]], dict[str, float]]:
    if metric == "comet":
        references, sources = columns
        scores = comet_scores(sources, predictions, references, **comet_options)
        return [{"comet": score} for score in scores], {}
    references_of = list(zip(*columns, strict=True))
    rows = list(zip(predictions, references_of, strict=True))
    if metric == "rouge":
        return [rouge_scores(prediction, references) for prediction, references in rows], {}
    if metric == "chrf":
        segments = [
            {"chrf": sentence_chrf(prediction, references)} for prediction, references in rows
        ]
        return segments, {"chrf": corpus_chrf(predictions, references_of)}
    raise ValueError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")


def read_segments(path: Path) -> list[str]:
    """The lines of a UTF-8 file; an empty line is an empty segment.

    Lines end at a newline only, as for `wc -l`: a text may hold other line separators of Unicode.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def as_json(scores: FileScores) -> str:
    """One line of JSON: `metric`, `segments`, `mean` and, where there is one, `corpus`."""
    fields = {"metric": scores.metric, "segments": scores.segments, "mean": scores.mean}
    return json.dumps(fields | ({"corpus": scores.corpus} if scores.corpus else {}))


def as_text(scores: FileScores) -> str:
    """Lines of tab-separated cells: a header, each segment, the mean, and the corpus if it has one."""
    rows = [("segment", *scores.mean)]
    rows += [
        (str(number), *map(_cell, row.values())) for number, row in enumerate(scores.segments, 1)
    ]
    rows.append(("mean", *map(_cell, scores.mean.values())))
    if scores.corpus:
        rows.append(("corpus", *map(_cell, scores.corpus.values())))
    return "\n".join("\t".join(row) for row in rows)


def _cell(value: float) -> str:
    return f"{value:.4f}"
