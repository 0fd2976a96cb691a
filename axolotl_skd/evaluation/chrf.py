"""chrF, the character n-gram F-score of a translation (Popovic, 2015), by sacrebleu (extra `eval`).

Sacrebleu's defaults: n-grams of 1 to 6 characters, recall weighted by beta = 2, no words. With
several references the best one counts for each segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sentence_chrf(prediction: str, references: Sequence[str]) -> float:
    """chrF of one segment, in [0, 100].

    Args:
        prediction: the translation.
        references: one or more reference translations.

    Raises:
        ImportError: if sacrebleu is not installed.
        TypeError: if `references` is one bare string.
        ValueError: if there is no reference.
    """
    return corpus_chrf([prediction], [references])


def corpus_chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF over the n-gram counts of all segments together, in [0, 100]; not the mean over them.

    Args:
        predictions: N translations.
        references: N times the same number of reference translations.

    Raises:
        ImportError: if sacrebleu is not installed.
        TypeError: if the references of a segment are one bare string.
        ValueError: if there are no predictions, or the counts do not agree.
    """
    if any(isinstance(texts, str) for texts in references):
        raise TypeError("references of a segment are one string; pass a list of texts")
    counts = {len(texts) for texts in references}
    if len(predictions) != len(references) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"chrF needs the same number of references, at least one, for each prediction; got "
            f"{len(predictions)} predictions and references for {len(references)}, "
            f"{sorted(counts)} each"
        )
    streams = [list(stream) for stream in zip(*references, strict=True)]
    return _sacrebleu().corpus_chrf(list(predictions), streams).score


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("chrF needs sacrebleu: pip install 'axolotl-skd[eval]'") from error
    return sacrebleu
