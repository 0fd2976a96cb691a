r"""Whether two answers mean the same: structure first, then units, numbers, notations, formulas.

Structure, units and words come before algebra, because algebra is blind to them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from axolotl_skd.evaluation.answers.formulas import proportional, same_formula
from axolotl_skd.evaluation.answers.notations import (
    same_base,
    same_choice,
    same_date,
    same_ratio,
    text_key,
    words,
)
from axolotl_skd.evaluation.answers.numbers import Value, read_number
from axolotl_skd.evaluation.answers.structure import (
    LIST,
    UNION,
    UNORDERED,
    Parts,
    split,
    strip_parentheses,
)
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
_ALIASES = (
    (re.compile(r"(?:all )?real(?: number)?s|\\mathbb\s*\{?R\}?", re.I), r"(-\infty,\infty)"),
    (re.compile(r"\\\{\s*\\\}|empty ?set|no (?:real )?solutions?", re.I), r"\emptyset"),
)


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
    if kinds <= UNORDERED and (UNION not in kinds or len(kinds) == 1):
        return _match_all(gold.items, prediction.items)
    # Bare `3, -2` for `(3, -2)`: the brackets are missing, the order must be right.
    if len(kinds) == 1 or kinds == {LIST, "()"}:
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
    for special in (same_base, same_ratio, same_date, same_choice):
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
    gold_words, prediction_words = words(gold), words(prediction)
    if gold_words or prediction_words:
        return text_key(gold) == text_key(prediction)
    if percents == (True, False):
        gold_hundredth = rf"\frac{{{gold}}}{{100}}"
        return same_formula(gold, prediction) or same_formula(gold_hundredth, prediction)
    if percents == (False, True):
        hundredth = rf"\frac{{{prediction}}}{{100}}"
        return same_formula(gold, prediction) or same_formula(gold, hundredth)
    return same_formula(gold, prediction)


def _same_value(gold: Value, prediction: Value, percents: tuple[bool, bool]) -> bool:
    if gold.matches(prediction):
        return True
    if percents == (True, False):
        return gold.percent().matches(prediction)
    if percents == (False, True):
        return gold.matches(prediction.percent())
    return False


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
    return proportional(gold, prediction, r"=") is not None


def _same_inequality(gold: str, prediction: str) -> bool:
    for relation in ("<", r"\le"):
        turned = {"<": ">", r"\le": r"\ge"}[relation]
        sides = [_less(text, relation, turned) for text in (gold, prediction)]
        if None not in sides:
            factor = proportional(*sides, relation)
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


def _key(text: str) -> str:
    """`text` without the white space that means nothing: all but that between two numbers."""
    return re.sub(r"(?<![\w.])\s+|\s+(?![\w.])", "", text)
