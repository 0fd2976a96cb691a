"""What all configs share: header, blocks, and which rollout keys a method reads."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from axolotl_skd.methods import Method
from axolotl_skd.rollout.types import Source

# A key, its value as YAML, and what its comment says.
Entry = tuple[str, Any] | tuple[str, Any, str]


def yaml_lines(entries: Iterable[Entry], indent: int = 0) -> str:
    """One key a line."""
    lines = []
    for key, value, *note in entries:
        lines.append(" " * indent + f"{key}: {value}" + "".join(f"  # {text}" for text in note))
    return "".join(line + "\n" for line in lines)


def header(name: str, text: str) -> str:
    """The launch command and `text` as comments: prose is wrapped, indented lines are commands."""
    lines = [f"axolotl train example_configs/{name}.yml", ""]
    for line in text.strip("\n").splitlines():
        lines += [line] if not line or line.startswith(" ") else textwrap.wrap(line, 98)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def models(base_model: str) -> str:
    return f"base_model: {base_model}\nplugins:\n  - axolotl_skd.SKDPlugin\n"


def rollout_entries(method: Method, settings: Mapping[str, tuple[Any, ...]]) -> list[Entry]:
    """Those of `settings` that `method` reads; by who writes its completions."""
    student = ("student_temperature", "student_top_p")
    teacher = ("teacher_temperature", "teacher_top_p")
    keys = {
        Source.DATASET: (),
        Source.STUDENT: ("max_new_tokens", *student),
        Source.TEACHER: ("max_new_tokens", *teacher),
        Source.INTERLEAVED: (
            *("max_new_tokens", "num_draft_tokens", "teacher_top_k"),
            *(*student, *teacher),
        ),
    }[method.source]
    return [(key, *settings[key]) for key in ("max_prompt_tokens", *keys)]


def chat_rows(key: str, path: str) -> str:
    """`datasets:` or `test_datasets:` of one file of chat rows."""
    source = f"  - path: {path}\n    ds_type: json\n    type: chat_template\n    split: train\n"
    return f"{key}:\n{source}"


def folders(output_dir: str) -> list[Entry]:
    return [("dataset_prepared_path", f"{output_dir}/prepared"), ("output_dir", output_dir)]


def unpacked(sequence_len: int) -> list[Entry]:
    return [
        ("sequence_len", sequence_len),
        ("sample_packing", "false"),
        ("pad_to_sequence_len", "false"),
    ]
