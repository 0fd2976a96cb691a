"""The unit at the end of an answer: `12 hours`, `$1,500`, `30°`, `50%`, `25 cm^2`, `9 (apples)`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from axolotl_skd.evaluation.answers.numbers import read_number

PERCENT = "%"

# Known units, the first spelling of each line its name. A unit that is not listed is a noun.
_SPELLINGS = """
    % percent percentage pct percents
    $ dollar dollars usd buck bucks
    ¢ cent cents
    € euro euros eur
    ¥ yen yuan jpy cny
    ₹ rupee rupees rs inr
    pound pounds lb lbs £ gbp
    ° degree degrees deg
    celsius c centigrade
    fahrenheit f
    radian radians rad
    m meter meters metre metres
    cm centimeter centimeters centimetre centimetres
    mm millimeter millimeters millimetre millimetres
    dm decimeter decimeters decimetre decimetres
    km kilometer kilometers kilometre kilometres kms
    foot feet ft
    inch inches in
    yard yards yd yds
    mile miles mi
    s second seconds sec secs
    minute minutes min mins
    hour hours h hr hrs
    day days
    week weeks wk wks
    month months
    year years yr yrs
    g gram grams gm
    mg milligram milligrams
    kg kilogram kilograms kilo kilos kgs
    ton tons tonne tonnes
    ounce ounces oz
    gb gigabyte gigabytes
    mb megabyte megabytes
    l liter liters litre litres
    ml milliliter milliliters millilitre millilitres
    gallon gallons gal
    quart quarts qt
    pint pints pt
    cup cups
    joule joules j
    watt watts w
    kw kilowatt kilowatts
    mph
    km/h kph kmh kmph
    ^2 square sq squared
    ^3 cubic cu cubed
    am
    pm
    / per
"""
_NAMES = {word: line.split()[0] for line in _SPELLINGS.splitlines() for word in line.split()}
_COMPOUND = {"mph": ("mile", "/", "hour"), "km/h": ("km", "/", "hour")}
# A lone letter is a unit only after a space: `5 m`, while `5m` is a product.
_LETTERS = frozenset("mghlsLCFJW")
# Not units but part of the number, or what makes it another number.
_NUMBER_TEXT = (
    "hundred thousand million billion trillion dozen hundreds thousands millions billions half "
    "halves thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths "
    "factorial plus minus negative mod sin cos tan cot sec csc log ln exp sqrt pi cis infinity inf "
    "max gcd lcm"
)
_NUMBER_WORDS = frozenset(_NUMBER_TEXT.split())
# Part of the number at the end (`a third`, `2 third`), but not in `9 third graders`.
_ORDINAL_TEXT = "third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth"
_ORDINALS = frozenset(_ORDINAL_TEXT.split())
# Words that show a sentence, where the number at its head is not the answer.
_SENTENCE_TEXT = (
    "or and not than least most below above under over less until if when where for is are was "
    "through between none no only except about because but unless "
    "january february march april may june july august september october november december"
)
_SENTENCE_WORDS = frozenset(_SENTENCE_TEXT.split())
# Words of a unit that say nothing about it.
_FILLERS = frozenset({"of", "an", "the", "old", "total", "each"})
_MARKS = re.compile(r"\s*(?:[%¢€£¥₹°]|(?<=[\d)}])\s*\$)$")
_WORD = re.compile(
    r"(?P<gap>^|[\s/(-]|(?<=[\d)}%°]))(?P<word>[A-Za-z](?:[A-Za-z'-]*[A-Za-z]|(?:\.[A-Za-z])+)?)"
    r"\.?(?P<power>\s*\^\s*\{?\s*[23]\s*\}?)?\s*$"
)
_PREFIX = re.compile(
    r"^(?P<sign>[-+]?)\s*(?:(?:US|USD|CA|AU|C|A|HK|S|NZ)?\s*(?P<mark>[$€£¥₹])"
    r"|(?P<code>Rs\.?|USD|EUR|GBP|INR)(?=[\s\d]))\s*"
)
_PARENTHESES = re.compile(
    r"(?<=[\d)}%\s])(?P<gap>\s*)\(\s*(?P<inside>[A-Za-z][A-Za-z .,/'^{}23-]*)\)\s*$"
)
# The degrees of `\\sin 30°` belong to the argument.
_ANGLE_FUNCTION = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_VARIABLES = re.compile(r"[abcxyz]+")


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of one answer.

    Attributes:
        measures: names of known units in order, e.g. `("km", "/", "hour")` or `("cm", "^2")`.
        nouns: other words, singular and in lower case, e.g. `{"red", "apple"}`.
    """

    measures: tuple[str, ...] = ()
    nouns: frozenset[str] = frozenset()

    def agrees(self, other: Unit) -> bool:
        """Whether the two can mean the same; a missing unit agrees with every unit."""
        if not self or not other:
            return True
        if self.measures or other.measures:
            return _agree(self.measures, other.measures)
        return self.nouns <= other.nouns or other.nouns <= self.nouns

    def __bool__(self) -> bool:
        return bool(self.measures or self.nouns)


def _agree(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    degrees = {one, other}
    # 30 degrees says nothing about the scale, so it agrees with 30 °C.
    return one == other or any(
        degrees == {("°",), ("°", scale)} for scale in ("celsius", "fahrenheit")
    )


def split_unit(text: str) -> tuple[str, Unit]:
    """The number (or formula) of a tidied answer, and its unit.

    Args:
        text: an answer as `tidy` returns it, e.g. `"25 square feet"`.

    Returns:
        What is left, e.g. `"25"`, and the unit, empty where there is none. Words after which
        nothing numeric would be left (`"Monday"`), and words of a sentence (`"5 or more"`), are no
        unit: the text comes back whole.
    """
    core, front = _split_prefix(text)
    core, words = _split_words(_without_parentheses(core))
    if words is None or not (re.search(r"\d|\\", core) or read_number(core)):
        return text, Unit()
    unit = _unit([*words, *front])
    return (text, Unit()) if _is_operation(words, unit) else (core, unit)


def _without_parentheses(text: str) -> str:
    """`9 (apples)` as `9 apples`; `3(x-2)` and `3(m)` are products and stay."""
    match = _PARENTHESES.search(text)
    if match is None or (re.search(r"\b[A-Za-z]\b", match["inside"]) and not match["gap"]):
        return text
    rest, words = _split_words(f"1 {match['inside']}")
    return f"{text[: match.start()]} {match['inside']}" if words and rest == "1" else text


def _is_operation(words: list[str], unit: Unit) -> bool:
    """`5 squared` is 25 and `1/m` a fraction: neither is 5 or 1 of something."""
    power = bool(unit.measures) and unit.measures[0].startswith("^") and not unit.nouns
    return power or (words[:1] == ["/"] and all(len(word) == 1 for word in words))


def _split_prefix(text: str) -> tuple[str, list[str]]:
    match = _PREFIX.match(text)
    if match is None:
        return text, []
    word = (match["mark"] or match["code"]).lower().strip(".")
    return match["sign"] + text[match.end() :], [_NAMES[word]]


def _split_words(text: str) -> tuple[str, list[str] | None]:
    """`text` without the unit at its end and the unit's words; None for those of a sentence."""
    words: list[str] = []
    while True:
        text = text.rstrip()
        mark = _MARKS.search(text)
        if mark and not (mark[0].strip() == "°" and _ANGLE_FUNCTION.search(text)):
            words.insert(0, _NAMES[mark[0].strip()])
            text = text[: mark.start()]
            continue
        match = _WORD.search(text)
        if match is None:
            return _no_slash(text, words)
        word = match["word"].replace(".", "")
        if word.lower() in _SENTENCE_WORDS:
            return text, None
        if not _is_unit(word, match, text, bool(words)):
            return _no_slash(text, words)
        power = re.sub(r"[^23]", "", match["power"] or "")
        slash = ["/"] if match["gap"] == "/" else []
        words = [*slash, word, *([f"^{power}"] if power else []), *words]
        text = text[: match.start()]


def _no_slash(text: str, words: list[str]) -> tuple[str, list[str]]:
    return text.rstrip(), words


def _is_unit(word: str, match: re.Match[str], text: str, inside: bool) -> bool:
    lower = word.lower()
    if lower in _NUMBER_WORDS or (lower in _ORDINALS and not inside):
        return False
    if len(word) == 1:
        spaced = bool(match["gap"]) or text[: match.start()].endswith("°")
        return word in _LETTERS and spaced and (word not in "CF" or "°" in text)
    if lower in _NAMES or lower in _FILLERS:
        # `in` and `am` are words of a sentence, too, but then what is before them is no number.
        return True
    if not match["gap"] or _VARIABLES.fullmatch(word):
        return False
    # `a-b` is a difference. `DS` alone may be a segment, before `games` it is none.
    return len(max(word.split("-"), key=len)) > 2 or (inside and word.isupper() and "-" not in word)


def _unit(words: list[str]) -> Unit:
    measures: list[str] = []
    nouns: set[str] = set()
    for word in words:
        lower = word.lower()
        name = _NAMES.get(lower, word if word in {"^2", "^3", "/"} else None)
        if name is not None:
            measures.extend(_COMPOUND.get(name, (name,)))
        elif lower not in _FILLERS:
            nouns.add(_singular(lower))
    return Unit(_ordered(measures), frozenset(nouns))


def _ordered(measures: list[str]) -> tuple[str, ...]:
    """`square feet` as `feet ^2`, `dollars $` once, and no slash without what it divides by."""
    powers = [name for name in measures if name.startswith("^")]
    others = [name for name in measures if not name.startswith("^")]
    once = [name for i, name in enumerate(others) if name == "/" or name not in others[:i]]
    if "$" in once and once[0] != "$":
        once = ["$", *(name for name in once if name != "$")]
    while once and once[-1] == "/":
        once.pop()
    return (*once, *powers)


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
