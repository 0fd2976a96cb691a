"""Finding the final answer in a model's free text."""

from __future__ import annotations

_MARKER = "####"


def extract_hash(text: str) -> str | None:
    """The answer in GSM8K's format: what follows the first `####`, up to the end of that line.

    Args:
        text: a completion, or a reference solution, e.g. `"40 + 2 = 42\\n#### 42"`.

    Returns:
        The answer without surrounding white space, e.g. `"42"`; None where there is no marker or
        nothing behind it.
    """
    _, _, tail = text.partition(_MARKER)
    return tail.partition("\n")[0].strip() or None
