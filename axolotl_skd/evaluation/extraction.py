"""Finding the final answer in a model's free text."""

from __future__ import annotations

import re

_MARKER = "####"
# A box's opening, an escaped character (`\\{`, `\\\\`), or a brace: all that brace matching looks at.
_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


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


def extract_boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` or `\fbox{...}` holds.

    Braces are matched, escaped ones (`\{`, `\}`) aside, so that `\boxed{\frac{1}{2}}` is whole. A
    box that never closes, as in a completion cut short, is none, and a box within a box belongs to
    the outer one: `\boxed{\boxed{5}}` holds `5`. Takes time linear in the text.

    Args:
        text: a completion or a reference solution.

    Returns:
        The content without surrounding white space, e.g. `r"\frac{1}{2}"`; None where there is no
        closed box or the last one is empty.
    """
    content = _last_box(text)
    while content is not None and (inner := _only_box(content)) is not None:
        content = inner
    return content or None


def _last_box(text: str) -> str | None:
    """The content of the closed box that ends last, the outermost one of those nested there."""
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    found: tuple[int, int] | None = None
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                found = start, token.start()
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token.end() if token[0] != "{" else None)
    return None if found is None else text[found[0] : found[1]].strip()


def _only_box(content: str) -> str | None:
    """The content of the box that `content` consists of; None if there is anything else in it."""
    opening = re.match(r"\\(?:boxed|fbox)\s*\{", content)
    if opening is None or not content.endswith("}"):
        return None
    inner = content[opening.end() : -1]
    depth = 0
    for token in _BOX_TOKEN.finditer(inner):
        if token[0] == "}":
            depth -= 1
            if depth < 0:
                return None
        elif token[0].endswith("{") and token[0] != r"\{":
            depth += 1
    return inner.strip() if depth == 0 else None
