r"""Answers in notations of their own: words, multiple choice, number bases, ratios, times, dates.

Each `same_...` gives a verdict, or None where neither answer (or not the gold one) is of its kind.
"""

from __future__ import annotations

import re
from fractions import Fraction

from axolotl_skd.evaluation.answers.numbers import read_number
from axolotl_skd.evaluation.answers.units import split_unit

_BASED = re.compile(
    r"\(?(?P<digits>(?=[A-Fa-f]*[0-9])[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?(?:\s*_\s*\{?\s*\(?(?P<base>[0-9]{1,2}|[a-z]+)"
    r"\)?\s*\}?|\s*\(?\s*base\s+(?P<named>[0-9]{1,2}|[a-z]+)\)?)"
)
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip
_RATIO = re.compile(r"(?P<first>[^:]+):(?P<second>[^:]+)")
_CLOCK = re.compile(r"[0-9]{1,2}:[0-5][0-9](?::[0-5][0-9])?")
_DATE = re.compile(r"([0-9]{4})-(0?[1-9]|1[0-2])-(0?[1-9]|[12][0-9]|3[01])")
_CHOICE = re.compile(r"\(?([A-Ha-h])[).]?")
_CHOICE_WITH_TEXT = re.compile(
    r"(?:\(([A-H])\)|([A-H])[).:])\s+(?!.*(?<![A-Za-z])[A-H](?![A-Za-z]))\S.*"
)
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z']{2,}")
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi lcm gcd max min "
    "mod det inf infinity cis"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_PRODUCT = re.compile(r"[abcxyz]{2,3}")


def words(text: str) -> list[str]:
    """The words of `text` that are no formula."""
    if _PRODUCT.fullmatch(text):
        return []
    if re.fullmatch(r"[A-Za-z']{2,}", text) and text.lower() not in _FUNCTIONS:
        return [text]
    return [
        word
        for word in _WORD.findall(text)
        if len(word) > 2 and word.lower() not in _FUNCTIONS and not _PRODUCT.fullmatch(word)
    ]


def text_key(text: str) -> str:
    """The words of `text` without case, punctuation and a leading article."""
    found = re.sub(r"[^\w%$:/.+-]+|\.(?!\d)", " ", text.casefold().replace("'", "")).split()
    return " ".join(found[1:] if len(found) > 1 and found[0] in {"the", "a", "an"} else found)


def same_choice(gold: str, prediction: str) -> bool | None:
    """Multiple choice: `(A)`, `A.`, `a` and, for the prediction, `(A) 12` are the choice A."""
    choice = _CHOICE.fullmatch(gold)
    if choice is None:
        return None
    given = _CHOICE.fullmatch(prediction) or (
        _CHOICE_WITH_TEXT.fullmatch(prediction) if choice[1].isupper() else None
    )
    if given is None:
        return None
    return choice[1].casefold() == next(filter(None, given.groups())).casefold()


def same_base(gold: str, prediction: str) -> bool | None:
    """`101_2`: the base may be left out of one, but two different bases are never the same."""
    numbers = _BASED.fullmatch(gold), _BASED.fullmatch(prediction)
    if numbers == (None, None):
        return None
    digits, bases = [], []
    for text, number in zip((gold, prediction), numbers, strict=True):
        digits.append((number["digits"] if number else text.replace(",", "")).strip().upper())
        base = (number["base"] or number["named"]) if number else None
        bases.append(_BASES.get(base, base) if base else None)
    return digits[0] == digits[1] and (None in bases or bases[0] == bases[1])


def same_ratio(gold: str, prediction: str) -> bool | None:
    """`3:4` is `6 : 8`; a time of day such as `3:30` is itself only."""
    if ":" not in gold and ":" not in prediction:
        return None
    gold, prediction = (re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", text) for text in (gold, prediction))
    (gold_time, gold_unit), (time, unit) = split_unit(gold), split_unit(prediction)
    if ":" in gold and ":" in prediction and _CLOCK.fullmatch(gold_time):
        if _CLOCK.fullmatch(time):
            return _clock(gold_time) == _clock(time) and gold_unit.agrees(unit)
        return text_key(gold) == text_key(prediction)
    ratios = [_ratio(text) for text in (gold_time, time)]
    if None in ratios:
        return text_key(gold) == text_key(prediction)
    return ratios[0] == ratios[1]


def same_date(gold: str, prediction: str) -> bool | None:
    """`2024-01-02` is no difference of numbers: only the same day is the same."""
    dates = _DATE.fullmatch(gold), _DATE.fullmatch(prediction)
    if dates == (None, None):
        return None
    if None in dates:
        return False
    return [*map(int, dates[0].groups())] == [*map(int, dates[1].groups())]


def _clock(text: str) -> list[int]:
    return [int(part) for part in text.split(":")]


def _ratio(text: str) -> Fraction | None:
    match = _RATIO.fullmatch(text)
    if match is None:
        value = read_number(text)
        return value.exact if value is not None and re.search(r"/|\\frac", text) else None
    first, second = read_number(match["first"]), read_number(match["second"])
    if first is None or second is None or not second.exact:
        return None
    return first.exact / second.exact
