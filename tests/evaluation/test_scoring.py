"""What a row's metrics are, and what becomes of them over all rows."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from axolotl_skd.evaluation import scoring
from axolotl_skd.evaluation.comet import CometUnavailableError
from axolotl_skd.evaluation.score_files import read_segments
from axolotl_skd.evaluation.scoring import (
    extract_all,
    mean_chrf,
    mean_comet,
    mean_of_known,
    score_answer,
    score_translation,
    warn_without_comet,
)

TRIPLES = [("উৎস", "a\nb", "a b"), ("দুই", "c", "d")]


def raising(error: Exception) -> Callable[..., list[float]]:
    def comet_scores(*_: object) -> list[float]:
        raise error

    return comet_scores


def test_an_answer_counts_for_its_own_kinds_only() -> None:
    row = {"benchmark": "svamp", "answer": "5", "breakdown": ["acc_subtraction"]}
    assert score_answer(row, "5.0") == {
        "acc": 1.0,
        "has_answer": 1.0,
        "acc_addition": None,
        "acc_common_division": None,
        "acc_multiplication": None,
        "acc_subtraction": 1.0,
    }
    none = score_answer(row, "")
    assert (none["acc"], none["has_answer"], none["acc_subtraction"]) == (0, 0, 0)


def test_the_mean_leaves_out_rows_that_a_metric_is_not_for() -> None:
    assert mean_of_known([1.0, None, 0.0, None]) == 0.5
    assert math.isnan(mean_of_known([None]))


def test_only_the_first_response_counts() -> None:
    assert extract_all(lambda text: text or None, [["a", "b"], [""]]) == ["a", ""]


def test_chrf_is_of_the_corpus() -> None:
    same = [score_translation({"source": "x", "reference": text}, f" {text} ") for text in "ab"]
    assert mean_chrf([row["chrf"] for row in same]) == 100


def test_comet_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def comet_scores(sources: list, translations: list, references: list) -> list[float]:
        assert (sources, translations, references) == tuple(map(list, zip(*TRIPLES, strict=True)))
        return [80.0, 90.0]

    monkeypatch.setattr(scoring, "comet_scores", comet_scores)
    assert mean_comet(TRIPLES) == 85


@pytest.mark.parametrize(
    "error", [CometUnavailableError("no checkpoint"), RuntimeError("out of memory")]
)
def test_translations_outlive_a_comet_that_fails(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(scoring, "comet_scores", raising(error))
    assert math.isnan(mean_comet(TRIPLES))
    assert str(error) in caplog.text
    command = next(
        line for line in caplog.text.splitlines() if "axolotl skd score --metric comet" in line
    )
    files = [Path(word) for word in shlex.split(command.partition("--metric comet")[2])]
    assert [read_segments(file) for file in files] == [["a b", "c"], ["a b", "d"], ["উৎস", "দুই"]]


def test_a_missing_comet_is_said_before_anything_is_translated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "comet_scores", raising(CometUnavailableError("no checkpoint")))
    with caplog.at_level(logging.WARNING):
        warn_without_comet()
    assert "COMET will be NaN" in caplog.text and "no checkpoint" in caplog.text
