r"""One way of writing for the many ways in which an answer can be set.

`tidy` takes the setting away (math delimiters, bold, fonts, spacing, Unicode) and leaves plain
LaTeX: `$\mathbf{7}\dfrac34\,\text{cm}.$` becomes `7\frac{3}{4} cm`.
"""

from __future__ import annotations

import re
import unicodedata

# Stands for LaTeX's row separator `\\` while single backslashes are looked at.
ROW = "\x00"

_SYMBOLS = {
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u2002\u2003\u2005", " "),
    **dict.fromkeys("\u200b\u2060\ufeff\u2061\u2062", ""),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "∶": ":",
    "π": r"\pi ",
    "𝜋": r"\pi ",
    "θ": r"\theta ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "∠": r"\angle ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "√": r"\sqrt",
    "º": "°",
    "％": "%",
    "…": r"\ldots ",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")

# Commands that only change the look of their one argument.
_FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up)?|mbox|hbox|math(?:rm|bf|it|sf|tt|normal)|emph"
    r"|boldsymbol|bm|underline|pmb|boxed|fbox|ensuremath)\s*\{([^{}]*)\}"
)
_NO_LOOK = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|hfill|centering|bf|rm|it)(?![A-Za-z])"
    r"|\\(?:[hv]space\*?|[hv]?phantom|color|label|tag)\s*\{[^{}]*\}|\\!"
)
_SPACES = re.compile(r"\\[,;:> ]|\\(?:q?quad|thinspace|enspace|space)(?![A-Za-z])|~|\s+")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*\.?")
_MARKDOWN = re.compile(r"(?<![\w)}\]*])(\*\*|__|`)([^*`]+?)\1(?![\w({\\*])")
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s+"
    r"|^(?:\\approx|\\equiv|\\therefore|\\Rightarrow|\\implies|=|≈|⇒|→)\s*",
    re.IGNORECASE,
)
_ROW_GAP = re.compile(ROW + r"\s*\[[\d.]+\s*(?:pt|em|ex|mm|cm)\]")
_TRAILING = re.compile(r"(?:[\s.,;:" + ROW + r"]|\\(?=$))+$")
_ALIASES = (
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
    (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"\\l?brace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\lbrack(?![A-Za-z])", "["),
    (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\infin(?![A-Za-z])", r"\\infty"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?(?![A-Za-z])", "°"),
    (r"\\%", "%"),
    (r"\\slash(?![A-Za-z])", "/"),
    (r"\\imath(?![A-Za-z])", "i"),
    (r"\{\s*,\s*\}", ","),
)
_ALIASES_COMPILED = tuple((re.compile(pattern), new) for pattern, new in _ALIASES)
_FRACTION_ARGUMENTS = (
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
)
# 325 000 and 325'000; not before a slash, where `1 100/200` is a mixed number.
_SPACED_GROUPS = re.compile(r"(?<![\w.,/'])(\d{1,3}(?:[ '’]\d{3})+)(?![\d/'’]| ?\d)")


def tidy(text: str) -> str:
    """`text` without its setting, as described at the top of this file.

    Upper and lower case stay, and so do units, equations and brackets.
    """
    text = _plain_characters(text.strip())
    text = text.replace("\\\\", ROW)
    text = _ROW_GAP.sub(ROW, text)
    text = _without_delimiters(text)
    text = _NO_LOOK.sub("", text)
    for pattern, new in _ALIASES_COMPILED:
        text = pattern.sub(new, text)
    text = _without_fonts(text)
    text = _SPACES.sub(" ", _SIZES.sub("", text))
    text = _MARKDOWN.sub(r"\2", text).strip("`\"' ")
    text = _LEAD_IN.sub("", text.strip())
    for pattern, new in _FRACTION_ARGUMENTS:
        text = pattern.sub(new, text)
    text = _SPACED_GROUPS.sub(lambda match: re.sub(r"[ '’]", "", match[1]), text)
    text = _TRAILING.sub("", text)
    return " ".join(text.split(" ")).strip() if text else ""


def _plain_characters(text: str) -> str:
    r"""Typographic characters as LaTeX: `½` is `\frac{1}{2}`, `²` is `^{2}`, `≤` is `\le `."""
    text = re.sub(r"[⁰¹²³⁴-⁹⁻⁺ⁿ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    return "".join(map(_plain_character, text))


def _plain_character(char: str) -> str:
    if char.isascii():
        return char if char.isprintable() else " "
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    compatible = unicodedata.normalize("NFKC", char)
    numerator, slash, denominator = compatible.partition("⁄")
    if slash:
        return rf"\frac{{{numerator}}}{{{denominator or 1}}}"
    return compatible if compatible.isprintable() else " "


def _without_delimiters(text: str) -> str:
    r"""No math delimiters, `\$` as a plain dollar sign; a lone `$` is a dollar sign, too."""
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        text = text.replace(opening, " ").replace(closing, " ") if opening in text else text
    dollars = text.replace(r"\$", "").count("$")
    if dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    return text.replace(r"\$", "$").strip()


def _without_fonts(text: str) -> str:
    previous = None
    while previous != text:
        # The spaces keep `5\text{cm}` from becoming the product 5 c m.
        previous, text = text, _FONTS.sub(r" \1 ", text)
    return text
