from __future__ import annotations

import random
from itertools import combinations

import pytest

from axolotl_skd.evaluation.rouge import rouge_scores


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge2", "rouge_l"),
    [
        # 2 of 3 words and 2 of 2; 1 of 2 bigrams and 1 of 1
        ("the cat sat", "the cat", 80.0, 200 / 3, 80.0),
        ("b a", "a b", 100.0, 0.0, 50.0),  # the order counts in ROUGE-L and not in ROUGE-1
        ("a x b y", "a b", 200 * 2 / 6, 0.0, 200 * 2 / 6),  # a subsequence may have gaps
        ("the the the", "the cat", 40.0, 0.0, 40.0),  # a word counts as often as in the reference
        ("Cats, RUN!", "cats run", 100.0, 100.0, 100.0),  # case and punctuation do not count
        ("cats", "cat", 0.0, 0.0, 0.0),  # no stemming
        ("", "a", 0.0, 0.0, 0.0),
        ("a", "", 0.0, 0.0, 0.0),
    ],
)
def test_by_hand(
    prediction: str, reference: str, rouge1: float, rouge2: float, rouge_l: float
) -> None:
    scores = rouge_scores(prediction, [reference])
    assert scores == pytest.approx({"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_l})


def test_the_mean_of_the_references_and_not_the_best() -> None:
    references = ["the cat", "b a", "the cat sat"]
    mean = rouge_scores("the cat sat", references)
    assert mean == pytest.approx(
        {"rouge1": (80 + 0 + 100) / 3, "rouge2": (200 / 3 + 0 + 100) / 3, "rougeL": (80 + 100) / 3}
    )


def longest_common(a: list[str], b: list[str]) -> int:
    """By trying all subsequences."""
    subsequences = {c for n in range(len(b) + 1) for c in combinations(b, n)}
    return max(n for n in range(len(a) + 1) for c in combinations(a, n) if c in subsequences)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    generator = random.Random(0)
    for _ in range(50):
        a, b = (generator.choices("abc", k=generator.randint(1, 7)) for _ in range(2))
        expected = 200 * longest_common(a, b) / (len(a) + len(b))
        assert rouge_scores(" ".join(a), [" ".join(b)])["rougeL"] == pytest.approx(expected)


def test_no_reference_and_a_bare_string_are_refused() -> None:
    with pytest.raises(ValueError, match="no reference"):
        rouge_scores("a", [])
    with pytest.raises(TypeError, match="one string"):
        rouge_scores("a", "a b")
