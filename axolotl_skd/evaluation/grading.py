"""Deciding whether an extracted answer is right."""

from __future__ import annotations

import logging
import re

from axolotl_skd.evaluation.answers.equivalence import same_writing
from axolotl_skd.evaluation.answers.text import tidy
from axolotl_skd.evaluation.grading_process import SECONDS_PER_PAIR, SHARED

LOG = logging.getLogger(__name__)

# What no honest answer exceeds. Beyond it only the very same text is right.
_MAX_CHARACTERS = 1000
_MAX_DEPTH = 32
_MAX_EXPONENT = 10_000
_MAX_FACTORIAL = 1000

# Deliberately [0-9] and not \d, which also matches the digits of other scripts.
_INTEGER = re.compile(r"(?P<prefix>[+-]?\$?|\$[+-])(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\.?")

_POWER_TOWER = re.compile(r"[0-9]+(?:\^-?[0-9]+)+")
_FACTORIAL = re.compile(r"([0-9]{4,})\)?!")


def grade(gold: str, prediction: str | None) -> bool:
    """Whether `prediction` means the same as the reference answer `gold`.

    Understood are LaTeX, plain and Unicode notation, units, currencies, percent, thousands
    separators, mixed numbers, sets, tuples, intervals, matrices, equations, words and multiple
    choice; formulas are compared by math-verify. A unit counts where both name one; decimals may be
    off by a relative 1e-4. The gold answer `None` (an unanswerable question) is matched by
    a literal None alone.

    Hostile text is safe: nothing in it is executed, and what takes longer than
    `SECONDS_PER_PAIR` is wrong, with a warning.

    Args:
        gold: the reference answer, as plain text or LaTeX.
        prediction: the answer as extracted; None = none was given, which is wrong.

    Raises:
        GradingUnavailableError: if math-verify is needed and cannot be started.
    """
    if prediction is None:
        return False
    gold, prediction = gold.strip(), prediction.strip()
    if not gold or gold == prediction:
        return bool(gold)
    if not (_is_reasonable(gold) and _is_reasonable(prediction)):
        return False
    verdict = same_writing(tidy(gold), tidy(prediction))
    if verdict is None:
        verdict = SHARED.equivalent(gold, prediction)
    if verdict is None:
        LOG.warning(
            "no verdict (an error, or more than %g s of work), so it counts as wrong: gold %.200r, "
            "prediction %.200r",
            SECONDS_PER_PAIR,
            gold,
            prediction,
        )
    return verdict is True


def _is_reasonable(text: str) -> bool:
    """Whether `text` is short, flat and small enough to be looked at as a formula."""
    if len(text) > _MAX_CHARACTERS:
        return False
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, abs(depth))
    return deepest <= _MAX_DEPTH and not _is_huge(text)


def _is_huge(text: str) -> bool:
    """Whether it holds a number like `9^{9^9}` or `100000!`, which nobody could write out."""
    plain = re.sub(r"[{}()\s,]", "", text.replace("**", "^"))
    for tower in _POWER_TOWER.findall(plain):
        exponent = 1
        for level in reversed(tower.split("^")[1:]):
            exponent = abs(int(level)) ** exponent if len(level) < 6 else _MAX_EXPONENT + 1
            if exponent > _MAX_EXPONENT:
                return True
    return bool(_FACTORIAL.search(plain)) and any(
        int(number[:9]) > _MAX_FACTORIAL for number in _FACTORIAL.findall(plain)
    )


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
