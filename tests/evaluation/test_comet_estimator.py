"""The built-in COMET estimator against scores that the package unbabel-comet gave.

`make_comet_golden.py` made those, on the checkpoints that `comet_tiny.py` builds here again.
"""

from __future__ import annotations

import json
import logging
import os
from itertools import combinations
from pathlib import Path

import pytest
import torch

from axolotl_skd.evaluation.comet import comet_scores
from axolotl_skd.evaluation.comet.estimator import sparsemax
from tests.evaluation.comet_tiny import SAMPLES, VARIANTS, build_checkpoint, build_encoder

GOLDEN = json.loads(
    Path(__file__).with_name("comet_golden.json").read_text(encoding="utf-8"),
)["scores"]
PACKAGE_PYTHON = os.environ.get("SKD_COMET_PYTHON")
TOLERANCE = 1e-3  # in hundredths; float32 leaves about 1e-4 on the CPU

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
SOURCES, TRANSLATIONS, REFERENCES = (list(texts) for texts in zip(*SAMPLES, strict=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("comet")
    encoder = build_encoder(folder / "encoder")
    return {name: build_checkpoint(folder / name, encoder, name) for name in VARIANTS}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scores_of_the_package(checkpoints: dict[str, Path], variant: str, device: str) -> None:
    scores = comet_scores(
        SOURCES, TRANSLATIONS, REFERENCES, checkpoint=checkpoints[variant], device=device
    )
    assert scores == pytest.approx([100 * score for score in GOLDEN[variant]], abs=TOLERANCE)


def test_the_variants_can_be_told_apart() -> None:
    """Or a transformation or a pooling that is mixed up would go unnoticed."""
    for first, second in combinations(VARIANTS, 2):
        if {first, second} != {"sparsemax", "the_file_does_not_count"}:
            for a, b in zip(GOLDEN[first], GOLDEN[second], strict=True):
                assert abs(100 * a - 100 * b) > 2 * TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_keep_the_order_and_do_not_matter(
    checkpoints: dict[str, Path], batch_size: int
) -> None:
    order = [4, 0, 8, 2, 7, 1, 6, 3, 5]
    shuffled = [[texts[i] for i in order] for texts in (SOURCES, TRANSLATIONS, REFERENCES)]
    scores = comet_scores(*shuffled, checkpoint=checkpoints["published"], batch_size=batch_size)
    expected = [100 * GOLDEN["published"][i] for i in order]
    assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_texts_are_cut_where_the_package_cuts_them(checkpoints: dict[str, Path]) -> None:
    """30 tokens with both special ones, so 28 of the text; each of these words is two tokens."""
    base = "a " * 13
    texts = [base + "b b", base + "b z", base + "z b"]
    first, beyond, within = comet_scores(
        [""] * 3, texts, [""] * 3, checkpoint=checkpoints["published"]
    )
    assert first == pytest.approx(beyond, abs=TOLERANCE)
    assert abs(first - within) > 2 * TOLERANCE


def test_each_role_of_a_text_counts(checkpoints: dict[str, Path]) -> None:
    a, b, c = (["rice"], ["house"], ["weather"])
    scores = {
        comet_scores(*texts, checkpoint=checkpoints["published"])[0]
        for texts in ((a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a))
    }
    assert len(scores) == 6


def test_two_copies_that_differ_are_told(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        comet_scores(["a"], ["b"], ["c"], checkpoint=checkpoints["the_file_does_not_count"])
        assert "hparams.yaml says pool: 'max', the checkpoint itself 'avg'" in caplog.text
        caplog.clear()
        comet_scores(["a"], ["b"], ["c"], checkpoint=checkpoints["published"])
        assert not caplog.records


@pytest.mark.parametrize("size", [1, 2, 5])
def test_sparsemax_is_the_nearest_point_of_the_simplex(size: int) -> None:
    """Of all supports, the one whose solution is feasible and nearest."""
    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        scores = torch.randn(size, generator=generator, dtype=torch.float64)
        points = []
        for n in range(1, size + 1):
            for support in map(list, combinations(range(size), n)):
                point = torch.zeros_like(scores)
                point[support] = scores[support] - (scores[support].sum() - 1) / n
                if (point >= 0).all():
                    points.append(point)
        nearest = min(points, key=lambda point: (point - scores).square().sum().item())
        torch.testing.assert_close(sparsemax(scores), nearest)


@pytest.mark.skipif(not PACKAGE_PYTHON, reason="SKD_COMET_PYTHON names no unbabel-comet")
@pytest.mark.parametrize("variant", ["published", "softmax"])
def test_the_package_itself(checkpoints: dict[str, Path], variant: str) -> None:
    scores = comet_scores(
        SOURCES,
        TRANSLATIONS,
        REFERENCES,
        checkpoint=checkpoints[variant],
        python=PACKAGE_PYTHON,
        device="cpu",
    )
    assert scores == pytest.approx([100 * score for score in GOLDEN[variant]], abs=TOLERANCE)
