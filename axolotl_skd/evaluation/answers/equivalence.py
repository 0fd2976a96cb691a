r"""Whether two answers mean the same: structure first, then units, numbers, text and algebra.

Algebra is math-verify's (https://github.com/huggingface/Math-Verify), asked about single formulas
only. What it would wave through is decided before it is asked: units (`5 km`, `5 m`), bases
(`101_2`, `101_3`), words (`listen`, `silent` are the same product of letters), equations without
real solutions.
"""

from __future__ import annotations

import cmath
import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from axolotl_skd.evaluation.answers.numbers import Value, close_to, read_number
from axolotl_skd.evaluation.answers.structure import UNORDERED, Parts, split, strip_parentheses
from axolotl_skd.evaluation.answers.text import tidy
from axolotl_skd.evaluation.answers.units import PERCENT, split_unit

# An answer of more parts than this is no answer.
_MAX_PARTS = 64

_NAME = re.compile(
    r"(?:m\s*)?(?:\\angle\s*)?(?:[A-Za-z]|[A-Z]{2,4}|\\(?!frac|sqrt|sin|cos|tan|log|ln)[a-zA-Z]+)"
    r"(?:_(?:\w|\{[^{}]*\}))?'*(?:\s*\(\s*[a-z](?:\s*,\s*[a-z])*\s*\))?"
    r"|\(\s*[a-z](?:\s*,\s*[a-z])*\s*\)"
    r"|[A-Za-z]{3,}(?: [A-Za-z]+)*"
)
_EQUALS = re.compile(r"(?<![<>!:])=(?!=)")
_RELATION = re.compile(r"(<|>|\\[lg]e(?![A-Za-z])|(?<![<>!:])=(?!=))")
_BASED = re.compile(
    r"\(?(?P<digits>[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?(?:\s*_\s*\{?\s*\(?(?P<base>[0-9]{1,2}|[a-z]+)"
    r"\)?\s*\}?|\s*\(?\s*base\s+(?P<named>[0-9]{1,2}|[a-z]+)\)?)"
)
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip
_RATIO = re.compile(r"(?P<first>[^:]+):(?P<second>[^:]+)")
_CLOCK = re.compile(r"[0-9]{1,2}:[0-5][0-9](?::[0-5][0-9])?")
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
_ALIASES = (
    (re.compile(r"(?:all )?real(?: number)?s|\\mathbb\s*\{?R\}?", re.I), r"(-\infty,\infty)"),
    (re.compile(r"\\\{\s*\\\}|empty ?set|no (?:real )?solutions?", re.I), r"\emptyset"),
)
# `4 2` is not 8; but the two numbers of `\log_2 8` are fine.
_TWO_NUMBERS = re.compile(r"(?<![_\d])\d+ +\d")
# pi as it is, and as word problems take it.
_PIS = (math.pi, 3.14)


def equivalent(gold: str, prediction: str) -> bool:
    """Whether `prediction` says the same as `gold`, both as they were written.

    May take long, or much memory, on hostile input.
    """
    return _same(_alias(tidy(gold)), _alias(tidy(prediction)))


def same_writing(gold: str, prediction: str) -> bool | None:
    """The verdict on two tidied answers that needs no algebra; None where it does.

    Fast and safe for any short text.
    """
    if not gold or not prediction:
        return False
    if _key(gold) == _key(prediction):
        return True
    values = read_number(gold), read_number(prediction)
    if values[0] is not None and values[1] is not None:
        return values[0].matches(values[1])
    return None


def _alias(text: str) -> str:
    for pattern, name in _ALIASES:
        if pattern.fullmatch(text):
            return name
    return text


def _key(text: str) -> str:
    """`text` without the white space that means nothing: all but that between two numbers."""
    return re.sub(r"(?<![\w.])\s+|\s+(?![\w.])", "", text)


def _same(gold: str, prediction: str) -> bool:
    verdict = same_writing(gold, prediction)
    if verdict is not None:
        return verdict
    gold_parts, parts = split(gold), split(prediction)
    if gold_parts is None and parts is None:
        return _same_single(strip_parentheses(gold), strip_parentheses(prediction))
    if gold_parts is None or parts is None:
        return _same_bracketless(gold, prediction, gold_parts, parts)
    return _same_parts(gold_parts, parts)


def _same_bracketless(
    gold: str, prediction: str, gold_parts: Parts | None, parts: Parts | None
) -> bool:
    r"""One has parts, the other none: `\{5\}` is 5, `x = \pm 2` is `\pm 2`, `A = [1,2]` too."""
    for single, several, turned in ((gold, parts, False), (prediction, gold_parts, True)):
        if several is None:
            continue
        other = prediction if single is gold else gold
        if len(several.items) == 1 and several.kind in UNORDERED:
            pair = (single, several.items[0])
            return _same(*(reversed(pair) if turned else pair))
        name, sides = _named(single)
        if name is not None and len(sides) == 1:
            return _same(other, sides[0]) if turned else _same(sides[0], other)
    return False


def _same_parts(gold: Parts, prediction: Parts) -> bool:
    if not len(gold.items) == len(prediction.items) <= _MAX_PARTS:
        return False
    kinds = {gold.kind, prediction.kind}
    if kinds <= UNORDERED and ("union" in kinds) == (len(kinds) == 1 and "union" in kinds):
        return _match_all(gold.items, prediction.items)
    # Bare `3, -2` for `(3, -2)`: the brackets are missing, the order must be right.
    if len(kinds) == 1 or kinds == {"list", "()"}:
        return all(map(_same, gold.items, prediction.items))
    return False


def _match_all(golds: Sequence[str], predictions: Sequence[str]) -> bool:
    """Whether each of `golds` has a prediction of its own, whatever their order."""
    left = list(predictions)
    for gold in golds:
        found = next((item for item in left if _key(item) == _key(gold)), None)
        if found is None:
            found = next((item for item in left if _same(gold, item)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_single(gold: str, prediction: str) -> bool:
    verdict = _same_relation(gold, prediction)
    if verdict is not None:
        return verdict
    for special in (_same_base, _same_ratio, _same_choice):
        verdict = special(gold, prediction)
        if verdict is not None:
            return verdict
    (gold_core, gold_unit), (core, unit) = split_unit(gold), split_unit(prediction)
    if not gold_unit.agrees(unit):
        return False
    if (gold_core, core) != (gold, prediction) and (
        split(gold_core) is not None or split(core) is not None
    ):
        return _same(gold_core, core)
    gold_core, core = strip_parentheses(gold_core), strip_parentheses(core)
    percents = PERCENT in gold_unit.measures, PERCENT in unit.measures
    return _same_quantity(gold_core, core, percents)


def _same_quantity(gold: str, prediction: str, percents: tuple[bool, bool]) -> bool:
    """Compare without units; `percents` = which of the two had a percent sign.

    Where only one has it, it may be left out (`20%` for `20`) or stand for hundredths (`50%` for
    `0.5`).
    """
    if not gold or not prediction:
        return False
    values = read_number(gold), read_number(prediction)
    if values[0] is not None and values[1] is not None:
        return _same_value(values[0], values[1], percents)
    if _key(gold) == _key(prediction):
        return True
    gold_words, words = _words(gold), _words(prediction)
    if gold_words or words:
        return _text_key(gold) == _text_key(prediction)
    if percents == (True, False):
        gold_hundredth = rf"\frac{{{gold}}}{{100}}"
        return _same_formula(gold, prediction) or _same_formula(gold_hundredth, prediction)
    if percents == (False, True):
        hundredth = rf"\frac{{{prediction}}}{{100}}"
        return _same_formula(gold, prediction) or _same_formula(gold, hundredth)
    return _same_formula(gold, prediction)


def _same_value(gold: Value, prediction: Value, percents: tuple[bool, bool]) -> bool:
    if gold.matches(prediction):
        return True
    if percents == (True, False):
        return gold.percent().matches(prediction)
    if percents == (False, True):
        return gold.matches(prediction.percent())
    return False


# --- words ---------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
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


def _text_key(text: str) -> str:
    words = re.sub(r"[^\w%$:/.+-]+|\.(?!\d)", " ", text.casefold().replace("'", "")).split()
    return " ".join(words[1:] if words[:1] in (["the"], ["a"], ["an"]) and words[1:] else words)


def _same_choice(gold: str, prediction: str) -> bool | None:
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


# --- special notations -----------------------------------------------------------------------------


def _same_base(gold: str, prediction: str) -> bool | None:
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


def _same_ratio(gold: str, prediction: str) -> bool | None:
    """`3:4` is `6 : 8`; a time of day such as `3:30` is itself only."""
    if ":" not in gold and ":" not in prediction:
        return None
    gold, prediction = (re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", text) for text in (gold, prediction))
    (gold_time, gold_unit), (time, unit) = split_unit(gold), split_unit(prediction)
    if _CLOCK.fullmatch(gold_time) or not (":" in gold and ":" in prediction):
        if _CLOCK.fullmatch(gold_time) and _CLOCK.fullmatch(time):
            return _clock(gold_time) == _clock(time) and gold_unit.agrees(unit)
        if ":" in gold and ":" in prediction:
            return _text_key(gold) == _text_key(prediction)
    ratios = [_ratio(text) for text in (gold_time, time)]
    if None in ratios:
        return _text_key(gold) == _text_key(prediction)
    return ratios[0] == ratios[1]


def _clock(text: str) -> list[int]:
    return [int(part) for part in text.split(":")]


def _ratio(text: str) -> Any:
    match = _RATIO.fullmatch(text)
    if match is None:
        value = read_number(text)
        return value.exact if value is not None and re.search(r"/|\\frac", text) else None
    first, second = read_number(match["first"]), read_number(match["second"])
    if first is None or second is None or not second.exact:
        return None
    return first.exact / second.exact


# --- equations and inequalities ------------------------------------------------------------------


def _named(text: str) -> tuple[str | None, list[str]]:
    r"""The name that is defined (`x = 5`, `f(x) = 2x`), if any, and all other sides."""
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) > 1 and _NAME.fullmatch(sides[0]):
        return sides[0], sides[1:]
    return None, sides


def _same_relation(gold: str, prediction: str) -> bool | None:
    """The verdict where one of the two is an equation or inequality; None where none is."""
    gold_relations, relations = _RELATION.findall(gold), _RELATION.findall(prediction)
    if not gold_relations and not relations:
        return None
    if set(gold_relations) | set(relations) != {"="}:
        return _same_inequality(gold, prediction)
    (gold_name, gold_sides), (name, sides) = _named(gold), _named(prediction)
    if not relations:
        return all(_same(side, prediction) for side in gold_sides)
    if not gold_relations:
        return all(_same(gold, side) for side in sides)
    if gold_name is not None and name is not None and _key(gold_name) == _key(name):
        return _same(gold_sides[-1], sides[-1])
    return _proportional(gold, prediction, r"=") is not None


def _same_inequality(gold: str, prediction: str) -> bool:
    for relation in ("<", r"\le"):
        turned = {"<": ">", r"\le": r"\ge"}[relation]
        sides = [_less(text, relation, turned) for text in (gold, prediction)]
        if None not in sides:
            factor = _proportional(*sides, relation)
            return factor is not None and factor > 0
    return False


def _less(text: str, relation: str, turned: str) -> str | None:
    """`a > b` as `b < a`; None unless there is exactly this one relation."""
    found = _RELATION.findall(text)
    if found == [relation]:
        return text
    if found == [turned]:
        left, right = text.split(turned)
        return f"{right}{relation}{left}"
    return None


def _proportional(gold: str, prediction: str, relation: str) -> float | None:
    """The constant factor between the left minus the right sides of two relations, if any."""
    import sympy

    differences = []
    for text in (gold, prediction):
        sides = text.split(relation)
        if len(sides) != 2:
            return None
        left, right = map(_parse, sides)
        if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
            return None
        differences.append(left - right)
    if not all(difference.free_symbols for difference in differences):
        return None
    factor = sympy.simplify(differences[1] / differences[0])
    return float(factor) if factor.is_number and factor.is_real and factor != 0 else None


# --- formulas --------------------------------------------------------------------------------------


def _same_formula(gold: str, prediction: str) -> bool:
    from math_verify import verify

    gold_formula, formula = _parse(gold), _parse(prediction)
    if gold_formula is None or formula is None:
        return False
    if _differ_in_case(_letters(gold), _letters(prediction)):
        return False
    if verify([gold_formula], [formula], float_rounding=12, timeout_seconds=None):
        return True
    return _close(gold, prediction, gold_formula, formula)


def _letters(text: str) -> set[str]:
    return set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def _differ_in_case(one: set[str], other: set[str]) -> bool:
    """Whether they are the same but for upper and lower case, which math-verify ignores."""
    return one != other and {char.lower() for char in one} == {char.lower() for char in other}


def _close(gold: str, prediction: str, gold_formula: Any, formula: Any) -> bool:
    """Numerically the same where one of the two is a decimal or has done without pi."""
    one_has_pi = (r"\pi" in gold) != (r"\pi" in prediction)
    if not one_has_pi and not any(re.search(r"\d\.\d|\.\d", text) for text in (gold, prediction)):
        return False
    return any(
        (pair := [_number(item, pi) for item in (gold_formula, formula)])
        and None not in pair
        and close_to(*pair)
        for pi in (_PIS if one_has_pi else _PIS[:1])
    )


def _number(formula: Any, pi: float) -> complex | None:
    import sympy

    try:
        value = complex(formula.doit().xreplace({sympy.pi: sympy.Float(pi)}).evalf())
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None
    return None if cmath.isnan(value) else value


@lru_cache(maxsize=256)
def _parse(text: str) -> Any:
    """The sympy expression of a formula; None if math-verify cannot read it.

    Only its LaTeX grammar is used: its reader of plain expressions goes through Python's `eval`.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, I, MatrixBase

    if _TWO_NUMBERS.search(text):
        return None
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_normalization())
    found = parse(
        f"${_latex(text)}$",
        extraction_config=[config],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    formula = found[0] if found else None
    if not isinstance(formula, Basic | MatrixBase):
        return None
    return formula.xreplace({symbol: I for symbol in formula.free_symbols if symbol.name == "i"})


def _normalization() -> Any:
    from latex2sympy2_extended import NormalizationConfig

    # Not its units: it takes the t of 5t for one.
    return NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )


_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\*"), r"\\cdot "),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|log|ln)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*°"), r"(\\frac{\1\\pi}{180})"),
)


def _latex(text: str) -> str:
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text
