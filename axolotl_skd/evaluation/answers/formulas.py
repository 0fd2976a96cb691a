r"""Whether two formulas are the same: algebra by math-verify and sympy.

Only formulas reach this file. What math-verify would wave through is decided before: units (`5 km`,
`5 m`), bases (`101_2`, `101_3`), words (`listen`, `silent` are the same product of letters).
"""

from __future__ import annotations

import cmath
import logging
import math
import re
from functools import lru_cache
from typing import Any

from axolotl_skd.evaluation.answers.numbers import close_to

# `4 2` is not 8; but the two numbers of `\log_2 8` are fine.
_TWO_NUMBERS = re.compile(r"(?<![_\d])\d+ +\d")
# pi as it is, and as word problems take it.
_PIS = (math.pi, 3.14)


def same_formula(gold: str, prediction: str) -> bool:
    """Whether two formulas are equal by algebra, or close where one is a decimal or without pi."""
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


_REWRITES = (
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


def proportional(gold: str, prediction: str, relation: str) -> float | None:
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
