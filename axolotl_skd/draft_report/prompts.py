"""Prompts for a report: from a file or from a bundled task, rendered by the student's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from axolotl_skd.draft_report.errors import DraftReportError
from axolotl_skd.evaluation.data_sources import DataUnavailableError, read_rows
from axolotl_skd.evaluation.tasks import check_tasks
from axolotl_skd.resources import resource_path

Conversation = list[dict[str, str]]  # turns with `role` and `content`, the assistant's to come


def read_prompt_file(path: Path, limit: int | None = None) -> list[Conversation]:
    """The conversations of a file, to be continued by the assistant.

    Args:
        path: `.jsonl` with `{"messages": [...]}` rows, whose last turn is left out if it is the
            assistant's; or plain text, one user turn a line.
        limit: only the first so many.

    Raises:
        DraftReportError: nothing in it, or a row that is neither.
    """
    try:
        rows = read_rows(path)
    except ValueError as error:
        raise DraftReportError(f"--prompts: {error}") from None
    if not rows:
        raise DraftReportError(
            f'--prompts: {path} holds no prompt. Give chat rows ({{"messages": [...]}}) in a '
            ".jsonl file, or one prompt a line in a text file."
        )
    return [
        _conversation(row, f"--prompts: row {i} of {path}") for i, row in enumerate(rows[:limit], 1)
    ]


def _conversation(row: Any, where: str) -> Conversation:
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return [{"role": "user", "content": row["text"]}]
    turns = row.get("messages") if isinstance(row, Mapping) else None
    well_formed = isinstance(turns, list) and all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns
    )
    if not well_formed:
        got = f"keys {sorted(row)}" if isinstance(row, Mapping) else repr(row)[:80]
        raise DraftReportError(
            f'{where} has {got}; needed are {{"messages": [{{"role": ..., "content": ...}}, ...]}}. '
            "`axolotl skd to-chat` makes such rows of others."
        )
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise DraftReportError(f"{where} has no turn before the assistant's. Give it a user turn.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def read_task(name: str, limit: int | None = None) -> list[Conversation]:
    """The questions of a bundled lm-eval task, each as a user turn.

    Raises:
        DraftReportError: no such task, a group, no lm-eval, or no data for the task.
    """
    try:
        check_tasks([name])
    except ValueError as error:
        raise DraftReportError(f"--task: {error}") from None
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DraftReportError(
            f"--task needs lm-eval ({error}): pip install 'axolotl-skd[eval]', or use --prompts."
        ) from None
    manager = TaskManager(include_path=str(resource_path("evals")), include_defaults=False)
    if name in manager.all_groups:
        raise DraftReportError(
            f"--task: {name} is a group of tasks. Name one task: {', '.join(manager.all_subtasks)}."
        )
    try:
        task = manager.load_task_or_group(name)[name]
    except (DataUnavailableError, ImportError) as error:
        raise DraftReportError(f"--task: {name} cannot be loaded: {error}") from None
    documents = list(task.eval_docs)[:limit]
    return [[{"role": "user", "content": task.doc_to_text(document)}] for document in documents]


def render(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> list[list[int]]:
    """Token ids up to where the assistant's answer begins.

    Args:
        conversations: turns, the assistant's to come.
        tokenizer: the student's.
        chat_template: default the tokenizer's own.

    Raises:
        DraftReportError: there is no chat template.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise DraftReportError(
            "the student's tokenizer has no chat template. Set chat_template: in the config."
        )
    return [
        tokenizer.apply_chat_template(
            turns, chat_template=chat_template, add_generation_prompt=True, return_dict=False
        )
        for turns in conversations
    ]
