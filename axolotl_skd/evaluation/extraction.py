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
    open_braces: list[tuple[int, int] | None] = []  # of a box: where it and its content start
    content: slice | None = None
    box: slice | None = None  # around that content, and the boxes that hold nothing else
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "}":
            opening = open_braces.pop() if open_braces else None
            if opening is None:
                continue
            start, inside = opening
            alone = (
                box is not None
                and start < box.start
                and _is_blank(text[inside : box.start], text[box.stop : token.start()])
            )
            content = content if alone else slice(inside, token.start())
            box = slice(start, token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token.start(), token.end()))
    return (text[content].strip() or None) if content else None


def _is_blank(*texts: str) -> bool:
    return not any(text.strip() for text in texts)
