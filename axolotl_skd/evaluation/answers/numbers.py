r"""The exact value of a written number: `1,250.50`, `7 3/4`, `-\frac{1}{3}`, `1.5\times 10^{-3}`."""

from __future__ import annotations

import cmath
import re
from dataclasses import dataclass
from fractions import Fraction

# The paper's relative tolerance, for answers written as decimals.
RELATIVE_TOLERANCE = 1e-4
# Python reads at most 4,300 digits as an int; nobody answers with more than a few hundred.
_MAX_DIGITS = 1000
_MAX_POWER_OF_TEN = 400

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_SMALL.split())} | {
    word: 10 * tens for tens, word in enumerate(_TENS.split(), start=2)
}
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_DECIMAL = re.compile(rf"(?P<digits>{_UNSIGNED})(?:\s?(?:st|nd|rd|th|\^\s*\{{\s*th\s*\}}))?")
_REPEATING = re.compile(
    r"(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)\\(?:overline|bar|dot)\s*\{?(?P<repeat>[0-9]+)\}?"
)
_POWER_OF_TEN = re.compile(
    rf"(?:(?P<factor>{_UNSIGNED})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*(?P<braced>[+-]?\s*[0-9]{1,4})\s*\}|\(?(?P<bare>[+-]?[0-9]{1,4})\)?)"
)
_E_NOTATION = re.compile(rf"(?P<factor>{_UNSIGNED})[eE](?P<exponent>[+-]?[0-9]{{1,4}})")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_MIXED = re.compile(
    r"(?P<whole>[0-9][0-9,]*)\s*(?:\\frac\s*\{\s*(?P<a>[0-9]+)\s*\}\s*\{\s*(?P<b>[0-9]+)\s*\}"
    r"|(?:(?<=\s)|(?:\band\s+)|-)(?P<c>[0-9]+)\s*/\s*(?P<d>[0-9]+))"
)
_MAGNITUDE = re.compile(rf"(?P<number>.+?)\s*(?P<word>{'|'.join(_MAGNITUDES)})s?", re.IGNORECASE)

_NEGATIVE = re.compile(r"(?:minus|negative)\s+([^-+].*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Value:
    """A number as it was written.

    Attributes:
        exact: its value.
        is_decimal: written with a decimal point (or in scientific notation with one), so possibly
            rounded.
    """

    exact: Fraction
    is_decimal: bool

    def matches(self, other: Value) -> bool:
        """Equal, or within `RELATIVE_TOLERANCE` where either may be rounded.

        Two integers are never merely close: 1000001 is not 1000000.
        """
        if self.exact == other.exact:
            return True
        integers = self.exact.denominator == other.exact.denominator == 1
        if integers or not (self.is_decimal or other.is_decimal):
            return False
        try:
            return close_to(float(self.exact), float(other.exact))
        except OverflowError:
            return False

    def percent(self) -> Value:
        """A hundredth of it."""
        return Value(self.exact / 100, self.is_decimal)


def read_number(text: str) -> Value | None:
    """The value of a tidied answer without its unit; None if it is not a plain number.

    Args:
        text: e.g. `"- 3"`, `"325,000"`, `"(1/3)"`, `"1 million"`.
    """
    text = text.strip()
    if len(text) > _MAX_DIGITS:
        return None
    if text[:1] in {"-", "+"}:
        value = read_number(text[1:]) if text[1:2] not in {"-", "+"} else None
        if value is None or text[0] == "+":
            return value
        return Value(-value.exact, value.is_decimal)
    if text.startswith("(") and text.endswith(")") and not re.search(r"[()]", text[1:-1]):
        return read_number(text[1:-1]) if "," not in text else None
    for reader in (_decimal, _mixed, _fraction, _scientific, _repeating, _in_words):
        value = reader(text)
        if value is not None:
            return value
    return None


def _decimal(text: str) -> Value | None:
    match = _DECIMAL.fullmatch(text)
    return None if match is None else _plain(match["digits"])


def _plain(digits: str) -> Value:
    return Value(Fraction(digits.replace(",", "").rstrip(".") or "0"), "." in digits.rstrip("."))


def _mixed(text: str) -> Value | None:
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    numerator, denominator = int(match["a"] or match["c"]), int(match["b"] or match["d"])
    if numerator >= denominator:
        return None
    whole = _decimal(match["whole"])
    return whole and Value(whole.exact + Fraction(numerator, denominator), False)


def _fraction(text: str) -> Value | None:
    match = _FRACTION.fullmatch(text)
    parts = match.groups() if match else tuple(text.split("/"))
    if len(parts) != 2:
        return None
    numerator, denominator = map(read_number, parts)
    if numerator is None or denominator is None or not denominator.exact:
        return None
    return Value(
        numerator.exact / denominator.exact, numerator.is_decimal or denominator.is_decimal
    )


def _scientific(text: str) -> Value | None:
    if match := _POWER_OF_TEN.fullmatch(text):
        exponent = int((match["braced"] or match["bare"]).replace(" ", ""))
    elif match := _E_NOTATION.fullmatch(text):
        exponent = int(match["exponent"])
    else:
        return None
    if abs(exponent) > _MAX_POWER_OF_TEN:
        return None
    factor = _plain(match["factor"]) if match["factor"] else Value(Fraction(1), False)
    return Value(factor.exact * Fraction(10) ** exponent, factor.is_decimal)


def _repeating(text: str) -> Value | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    fixed, repeat = match["fixed"], match["repeat"]
    nines = 10 ** len(repeat) - 1
    tail = Fraction(int(fixed or 0) * nines + int(repeat), nines * 10 ** len(fixed))
    return Value(int(match["whole"] or 0) + tail, False)


def _in_words(text: str) -> Value | None:
    if match := _MAGNITUDE.fullmatch(text):
        value = read_number(match["number"])
        power = _MAGNITUDES[match["word"].lower()]
        return value and Value(value.exact * 10**power, value.is_decimal)
    if match := _NEGATIVE.fullmatch(text):
        return read_number(f"-{match[1]}")
    tens, _, ones = text.lower().partition("-")
    if tens not in _WORDS or (ones and (ones not in _WORDS or _WORDS[tens] < 20)):
        return None
    return Value(Fraction(_WORDS[tens] + _WORDS.get(ones, 0)), False)


def close_to(one: complex, other: complex) -> bool:
    """Whether two numbers agree within `RELATIVE_TOLERANCE` of the larger; no infinity does."""
    return cmath.isfinite(one) and cmath.isclose(one, other, rel_tol=RELATIVE_TOLERANCE)
