from __future__ import annotations

from collections import Counter

import pytest

from axolotl_skd.evaluation.chrf import corpus_chrf, sentence_chrf


def naive_chrf(prediction: str, reference: str) -> float:
    """From the definition: means of precision and recall over the n-gram orders both texts have."""
    texts = [text.replace(" ", "") for text in (prediction, reference)]
    precisions, recalls = [], []
    for n in range(1, 7):
        a, b = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in texts)
        if a and b:
            precisions.append((a & b).total() / a.total())
            recalls.append((a & b).total() / b.total())
    precision, recall = (sum(values) / len(values) for values in (precisions, recalls))
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision else 0.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("ab", "ac"), ("the cat sat on", "the cats sit on it"), ("ঘৰ ভাল", "ঘৰত ভাল"), ("x", "y")],
)
def test_against_the_definition(prediction: str, reference: str) -> None:
    expected = naive_chrf(prediction, reference)
    assert sentence_chrf(prediction, [reference]) == pytest.approx(expected)


def test_by_hand() -> None:
    assert sentence_chrf("ab", ["ac"]) == pytest.approx(25)  # (1/2 + 0) / 2 both ways
    assert sentence_chrf("ab", ["ac", "ab"]) == pytest.approx(100)  # the best reference


def test_the_corpus_is_not_the_mean() -> None:
    predictions, references = ["ab", "x" * 20], [["ac"], ["x" * 20]]
    assert 95 < corpus_chrf(predictions, references) < 100
    assert corpus_chrf(predictions[::-1], references[::-1]) == corpus_chrf(predictions, references)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"], ["b", "c"]])],
)
def test_counts_that_do_not_agree(predictions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="same number of references.*got"):
        corpus_chrf(predictions, references)


def test_a_bare_string_is_refused() -> None:
    with pytest.raises(TypeError, match="one string"):
        sentence_chrf("a", "ab")
