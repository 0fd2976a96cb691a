"""Deciding whether an extracted answer is right."""

from __future__ import annotations

import re

# Deliberately [0-9] and not \d, which also matches the digits of other scripts.
_INTEGER = re.compile(r"(?P<prefix>[+-]?\$?|\$[+-])(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\.?")


def same_integer(gold: str, prediction: str | None) -> bool:
    """Whether two texts write the same integer.

    Understood are an optional sign, a dollar sign in front, thousands commas and a trailing full
    stop (`-$1,250.` is -1250). Everything else, a unit or a decimal fraction for instance, is no
    integer and never right: there is no leniency that a wrong answer could profit from.

    Args:
        gold: the reference answer, e.g. `"1250"`.
        prediction: the model's answer as extracted; None = it gave none, which is wrong.

    Returns:
        True only if both are integers and equal. Never raises, however long the texts.
    """
    if prediction is None:
        return False
    expected = _canonical_integer(gold)
    return expected is not None and expected == _canonical_integer(prediction)


def _canonical_integer(text: str) -> str | None:
    """`text` as plain digits with at most a leading minus; None if it is not an integer.

    Stays a string, because `int()` raises on more than 4,300 digits.
    """
    match = _INTEGER.fullmatch(text.strip())
    if match is None:
        return None
    digits = match["digits"].replace(",", "").lstrip("0")
    if not digits:
        return "0"
    return f"-{digits}" if "-" in match["prefix"] else digits
