"""`axolotl skd score` and the files it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from axolotl_skd.cli import skd
from axolotl_skd.evaluation.comet import comet_scores
from axolotl_skd.evaluation.score_files import read_segments, score_files
from tests.evaluation.comet_tiny import SAMPLES, build_checkpoint, build_encoder


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Hypotheses and two files of references."""
    return [
        write(tmp_path / "hyp.txt", "the cat sat", ""),
        write(tmp_path / "ref1.txt", "the cat", "a"),
        write(tmp_path / "ref2.txt", "the cat sat", "b"),
    ]


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(skd, ["score", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def error(*arguments: Any) -> str:
    result = CliRunner().invoke(skd, ["score", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return result.output


def test_rouge_with_two_references(files: list[Path]) -> None:
    assert run("--metric", "rouge", *files).splitlines() == [
        "segment\trouge1\trouge2\trougeL",
        "1\t90.0000\t83.3333\t90.0000",
        "2\t0.0000\t0.0000\t0.0000",
        "mean\t45.0000\t41.6667\t45.0000",
    ]


def test_json_is_one_line(files: list[Path]) -> None:
    """Axolotl prints its logo first; the last line of its output is the answer."""
    output = run("--metric", "rouge", "--json", *files)
    assert output.count("\n") == 1
    scores = json.loads(output)
    assert scores["metric"] == "rouge" and "corpus" not in scores
    assert scores["segments"][0]["rougeL"] == pytest.approx(90)
    assert scores["mean"]["rougeL"] == pytest.approx(45)


def test_chrf_has_a_score_of_the_whole_file(tmp_path: Path) -> None:
    hypotheses = write(tmp_path / "hyp.txt", "ab", "xyz")
    references = write(tmp_path / "ref.txt", "ac", "xyz")
    lines = run("--metric", "chrf", hypotheses, references).splitlines()
    assert lines[:4] == ["segment\tchrf", "1\t25.0000", "2\t100.0000", "mean\t62.5000"]
    # 4 of 5 letters, 2 of 3 pairs, 1 of 1 triple, of both files alike
    assert lines[4] == f"corpus\t{100 * (4 / 5 + 2 / 3 + 1) / 3:.4f}"


def test_comet_takes_references_then_sources(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(
        tmp_path / "checkpoint", build_encoder(tmp_path / "encoder"), "published"
    )
    samples = [texts for texts in SAMPLES if "\n" not in "".join(texts)][:4]
    source, hypothesis, reference = zip(*samples, strict=True)
    paths = [
        write(tmp_path / name, *texts)
        for name, texts in (("hyp", hypothesis), ("ref", reference), ("src", source))
    ]
    options = ["--checkpoint", checkpoint, "--batch-size", 2, "--device", "cpu"]
    scores = json.loads(run("--metric", "comet", "--json", *paths, *options))
    expected = comet_scores(source, hypothesis, reference, checkpoint=checkpoint, batch_size=2)
    assert [row["comet"] for row in scores["segments"]] == pytest.approx(expected)
    assert scores["mean"]["comet"] == pytest.approx(sum(expected) / 4)


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("a\u2028b\x0cc\r\n\n  d\re".encode())
    assert read_segments(path) == ["a\u2028b\x0cc", "", "  d\re"]


def test_unequal_lengths_name_each(files: list[Path]) -> None:
    write(files[2], "one")
    output = error("--metric", "rouge", *files)
    assert "hyp.txt has 2" in output and "ref1.txt has 2" in output and "ref2.txt has 1" in output


def test_what_else_is_refused(files: list[Path], tmp_path: Path) -> None:
    assert "got 1 files beside" in error("--metric", "comet", *files[:2])
    assert "device: only comet" in error("--metric", "chrf", *files, "--device", "cpu")
    assert "is no folder with" in error("--metric", "comet", *files, "--checkpoint", tmp_path)
    empty = write(tmp_path / "empty")
    assert "empty is empty" in error("--metric", "rouge", empty, empty)
    (tmp_path / "latin").write_bytes(b"\xe9\n")
    assert "latin is not UTF-8" in error("--metric", "rouge", *files[:1], tmp_path / "latin")
    with pytest.raises(ValueError, match="unknown metric 'bleu'; there are rouge, chrf, comet"):
        score_files("bleu", files[0], files[1:])
