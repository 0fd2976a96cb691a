"""ROUGE-1, ROUGE-2 and ROUGE-L of a text against one or several references (Lin, 2004).

Counted by the `rouge_score` package (extra `eval`) without stemming. It lowercases and keeps only
the characters a-z and 0-9: text in another script has no words left for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def rouge_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """F1 x 100 of each ROUGE type, the plain mean over the references.

    The mean and not the best reference: on DialogSum (500 dialogues of three references) the mean
    of these means is exactly the mean over the 1,500 pairs that papers report.

    Args:
        prediction: the text to score; an empty one scores 0.
        references: one or more texts of the same meaning, each of the same weight.

    Returns:
        `{"rouge1": ..., "rouge2": ..., "rougeL": ...}` in [0, 100].

    Raises:
        ImportError: if `rouge_score` is not installed.
        TypeError: if `references` is one bare string, whose characters would each be a reference.
        ValueError: if there is no reference.
    """
    if isinstance(references, str):
        raise TypeError("references is one string; pass a list of texts, e.g. [reference]")
    if not references:
        raise ValueError("no reference to compare with; pass at least one")
    pairs = [_scorer().score(reference, prediction) for reference in references]
    return {
        name: 100 * sum(pair[name].fmeasure for pair in pairs) / len(pairs) for name in ROUGE_TYPES
    }


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "ROUGE needs the package rouge_score: pip install 'axolotl-skd[eval]'"
        ) from error
    return RougeScorer(list(ROUGE_TYPES), use_stemmer=False)
