"""Chat rows from plain JSON lines: the form that Axolotl's `type: chat_template` reads."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class ConversionError(ValueError):
    """A row or template that cannot be converted."""


def chat_row(
    row: Mapping[str, Any], user: str, assistant: str | None, remove: Iterable[str] = ()
) -> dict[str, Any]:
    """One user and, unless it is to be a prompt alone, one assistant turn.

    Args:
        row: fields by name.
        user, assistant: templates with fields in braces; None = no such turn.
        remove: regular expressions whose matches are taken out of the assistant turn.

    Raises:
        ConversionError: a template names a field that the row lacks.
    """
    try:
        question, answer = user.format_map(row), (assistant or "").format_map(row)
    except KeyError as error:
        raise ConversionError(
            f"there is no field {error.args[0]!r}; the row has: {', '.join(row)} (a brace that is "
            "meant as text is written twice)"
        ) from error
    for pattern in remove:
        try:
            answer = re.sub(pattern, "", answer, flags=re.DOTALL)
        except re.error as error:
            raise ConversionError(f"{pattern!r} is no regular expression: {error}") from error
    turns = [{"role": "user", "content": question}]
    if assistant is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns}


def convert_file(
    source: Path,
    target: Path,
    user: str,
    assistant: str | None,
    remove: Sequence[str] = (),
    sample: int | None = None,
    seed: int = 42,
) -> int:
    """Convert a file of JSON lines; returns the number of rows written.

    Args:
        source, target: files; the target's folder is made.
        user, assistant, remove: see `chat_row`.
        sample: this many rows at random, in their order; default all.
        seed: of the sample.

    Raises:
        ConversionError: with the line it is about.
    """
    with source.open(encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    chosen = range(len(lines))
    if sample is not None:
        if sample > len(lines):
            raise ConversionError(f"--sample {sample}, but {source} has {len(lines)} rows")
        chosen = sorted(random.Random(seed).sample(chosen, sample))
    rows = []
    for index in chosen:
        try:
            rows.append(chat_row(json.loads(lines[index]), user, assistant, remove))
        except (json.JSONDecodeError, ConversionError) as error:
            raise ConversionError(f"{source}, row {index + 1}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    target.write_text(text, encoding="utf-8")
    return len(rows)
