r"""What an answer is made of: lists, sets, tuples, intervals, unions and matrices.

`(1, 2)` and `[1, 2]` differ, `1, 2` and `\{2, 1\}` do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from axolotl_skd.evaluation.answers.text import ROW

LIST, SET, UNION = "list", "set", "union"
UNORDERED = frozenset({LIST, SET, UNION})

_OPENERS, _CLOSERS = "([{", ")]}"
_MATRIX = re.compile(
    r"^\\begin\s*\{(?P<env>[bpvBV]?matrix|smallmatrix|array)\}(?:\s*\{[lcr| ]*\})?(?P<body>.*)"
    r"\\end\s*\{(?P=env)\}$",
    re.DOTALL,
)
_SEPARATORS = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*[,;]\s*(?:(?:and|or)\s+)?")
_COMMA_GROUPS = re.compile(r"(?<![\w,.])\$?[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?"
_CHAIN = re.compile(
    rf"^(?P<low>[^<>]+?)\s*(?P<left><|\\le(?![a-z]))\s*{_NAME}\s*(?P<right><|\\le(?![a-z]))"
    r"\s*(?P<high>[^<>]+)$"
)
_CHAIN_DOWN = re.compile(
    rf"^(?P<high>[^<>]+?)\s*(?P<right>>|\\ge(?![a-z]))\s*{_NAME}\s*(?P<left>>|\\ge(?![a-z]))"
    r"\s*(?P<low>[^<>]+)$"
)
_ONE_SIDED = re.compile(rf"^{_NAME}\s*(?P<relation><|>|\\[lg]e(?![a-z]))\s*(?P<bound>[^<>=]+)$")
_ONE_SIDED_TURNED = re.compile(
    rf"^(?P<bound>[^<>=]+?)\s*(?P<relation><|>|\\[lg]e(?![a-z]))\s*{_NAME}$"
)
_UNEQUAL = re.compile(rf"^{_NAME}\s*\\ne(?![a-z])\s*(?P<bound>[^<>=]+)$")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_MEMBER = re.compile(rf"^{_NAME}\s*\\in(?![a-z])\s*")


@dataclass(frozen=True, slots=True)
class Parts:
    """An answer of several parts.

    Attributes:
        kind: `LIST`, `SET`, `UNION`, a pair of brackets such as `"[)"`, or `"matrix 2x3"`.
        items: the parts' texts in their order, a matrix row by row.
    """

    kind: str
    items: tuple[str, ...]


def split(text: str) -> Parts | None:
    """The parts of a tidied answer; None for one that is of a piece, e.g. a number or formula."""
    text = as_interval(strip_parentheses(text))
    if matrix := _MATRIX.match(text):
        return _matrix(matrix["env"], matrix["body"])
    union = _split_top(text, re.compile(r"\s*\\cup(?![a-z])\s*"))
    if len(union) > 1:
        return Parts(UNION, tuple(union))
    enclosed = _brackets(text)
    if enclosed and enclosed[0] != SET and (signs := _both_signs(text)):
        return Parts(LIST, signs)
    if enclosed:
        kind, inside = enclosed
        items = _items(inside, thousands=", " in inside)
        if kind == SET:
            return Parts(kind, _with_both_signs(items))
        return Parts(kind, items) if len(items) > 1 else None
    items = _with_both_signs(_items(text, thousands=True))
    return Parts(LIST, items) if len(items) > 1 else None


def strip_parentheses(text: str) -> str:
    """`(x)` as `x`, as often as needed; `(1, 2)` and `(a)(b)` stay."""
    while (enclosed := _brackets(text)) and enclosed[0] == "()":
        inside = enclosed[1].strip()
        if not inside or len(_items(inside, thousands=", " in inside)) > 1:
            break
        text = inside
    return text


def as_interval(text: str) -> str:
    r"""An inequality of one name as an interval: `2 < x \le 5` is `(2,5]`; other text as it is."""
    text = _MEMBER.sub("", text)
    alternatives = [_interval(part) for part in re.split(r"\s*,?\s+or\s+", text)]
    if None in alternatives:
        return text
    return r"\cup ".join(filter(None, alternatives))


def _interval(text: str) -> str | None:
    if chain := _CHAIN.match(text) or _CHAIN_DOWN.match(text):
        opening = "(" if chain["left"] in "<>" else "["
        closing = ")" if chain["right"] in "<>" else "]"
        return f"{opening}{chain['low'].strip()},{chain['high'].strip()}{closing}"
    if match := _UNEQUAL.match(text):
        return rf"(-\infty,{match['bound']})\cup ({match['bound']},\infty)"
    if match := _ONE_SIDED.match(text):
        relation = match["relation"]
    elif match := _ONE_SIDED_TURNED.match(text):
        relation = _TURNED[match["relation"]]
    else:
        return None
    bound = match["bound"].strip()
    if relation in {"<", r"\le"}:
        return rf"(-\infty,{bound}{')' if relation == '<' else ']'}"
    return rf"{'(' if relation == '>' else '['}{bound},\infty)"


def _matrix(environment: str, body: str) -> Parts:
    rows = [row for row in body.split(ROW) if row.strip(" ")]
    cells = [[cell.strip() for cell in row.replace(r"\hline", "").split("&")] for row in rows]
    shape = "x".join(map(str, [len(cells), *sorted({len(row) for row in cells})]))
    # The bars of `vmatrix` make it a number, the determinant; all other brackets are a matter of
    # taste.
    name = "determinant" if environment in {"vmatrix", "Vmatrix"} else "matrix"
    return Parts(f"{name} {shape}", tuple(cell for row in cells for cell in row))


def _with_both_signs(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(each for item in items for each in _both_signs(item) or (item,))


def _both_signs(text: str) -> tuple[str, str] | None:
    r"""`1 \pm x` as `1 + x` and `1 - x`; `\mp` has the other sign of `\pm`."""
    if not re.search(r"\\(?:pm|mp)(?![a-z])", text):
        return None
    plus, minus = (
        re.sub(r"\\pm(?![a-z])", first, re.sub(r"\\mp(?![a-z])", second, text))
        for first, second in (("+", "-"), ("-", "+"))
    )
    return plus, minus


def _brackets(text: str) -> tuple[str, str] | None:
    """The kind and the inside of the brackets around the whole text, or None."""
    for opening, closing, kind in (
        (r"\{", r"\}", SET),
        (r"\langle", r"\rangle", "()"),
        *((left, right, left + right) for left in "([" for right in ")]"),
    ):
        if text.startswith(opening) and text.endswith(closing):
            inside = text[len(opening) : len(text) - len(closing)]
            if _balanced(inside):
                return kind, inside
    return None


def _balanced(text: str) -> bool:
    depth = 0
    for _, change in _depths(text):
        depth += change
        if depth < 0:
            return False
    return depth == 0


def _depths(text: str) -> Iterator[tuple[int, int]]:
    """Each position of a bracket with +1 for an opening, -1 for a closing one."""
    for position, char in enumerate(text):
        if char in _OPENERS:
            yield position, 1
        elif char in _CLOSERS:
            yield position, -1


def _items(text: str, *, thousands: bool) -> tuple[str, ...]:
    if thousands:
        text = _COMMA_GROUPS.sub(lambda match: match[0].replace(",", ""), text)
    return tuple(part.strip() for part in _split_top(text, _SEPARATORS) if part.strip())


def _split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` split at the separators outside all brackets."""
    depth_at = [0] * (len(text) + 1)
    for position, change in _depths(text):
        depth_at[position + 1] += change
    for position in range(1, len(depth_at)):
        depth_at[position] += depth_at[position - 1]
    parts, start = [], 0
    for match in separator.finditer(text):
        if depth_at[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]
