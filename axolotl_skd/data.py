"""From tokenised rows to prompts and completions: splitting, checking, collating.

A row's completion is its last trained span (labels != -100), its prompt all before it. Nothing here
runs a model, so the collator can work in dataloader processes.

Legend: B rows, L longest row, P_b prompt length, T_b completion length.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset
from torch import Tensor

from axolotl_skd.config import Distillation

LOG = get_logger(__name__)

IGNORE_INDEX = -100
SAMPLE_ID_COLUMN = "sample_id"


class DataError(ValueError):
    """Rows that cannot be distilled on."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a row's completion lies: tokens [start, stop); the prompt is [0, start).

    `num_spans` counts the row's trained spans (assistant turns).
    """

    start: int
    stop: int
    num_spans: int


def completion_span(labels: Sequence[int]) -> Span:
    """The last trained span of a row; empty, behind everything, if nothing is trained."""
    trained = np.asarray(labels) != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    if len(edges) == 0:
        return Span(len(trained), len(trained), 0)
    return Span(int(edges[-2]), int(edges[-1]), len(edges) // 2)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def sample_id(prompt_ids: Sequence[int], completion_ids: Sequence[int], given: Any = None) -> int:
    """What identifies a row wherever it turns up: a signed 64-bit hash.

    Of its own id (column `sample_id`) where one survived tokenisation, else of its token ids: it
    does not change with shuffling, sharding, caching or rank.
    """
    if given is not None:
        return _hash64(b"id:" + str(given).encode())
    prompt = _hash64(np.asarray(prompt_ids, dtype=np.int64).tobytes())
    completion = _hash64(np.asarray(completion_ids, dtype=np.int64).tobytes())
    return _hash64(np.array([prompt, completion], dtype=np.int64).tobytes())


def pad_rows(
    rows: Sequence[Tensor], prompt_lengths: Sequence[int], pad_token_id: int, multiple: int | None
) -> dict[str, Tensor]:
    """Right-padded model inputs of rows of token ids, trained on behind their prompts.

    Args:
        rows: B int64 tensors, prompt and completion.
        prompt_lengths: P_b of each.
        pad_token_id: may equal EOS: what counts is decided by position, not by id.
        multiple: L is rounded up to a multiple of this.

    Returns:
        input_ids, attention_mask, labels: int64 [B, L].
    """
    width = max(len(row) for row in rows)
    if multiple:
        width = -(-width // multiple) * multiple
    input_ids = rows[0].new_full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
        labels[index, prompt_length : len(row)] = row[prompt_length:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class DistillationCollator:
    """Batches of prompts with the data set's own completions, sample ids carried along."""

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int | None = None, **_: Any) -> None:
        """
        Args:
            tokenizer: only its pad token is used.
            pad_to_multiple_of: see `pad_rows`.
            _: what Axolotl passes to every collator (`padding`, `return_tensors`).
        """
        self.pad_token_id: int = tokenizer.pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows with input_ids and labels -> `pad_rows` + prompt_lengths, sample_ids: int64 [B]."""
        spans = [completion_span(feature["labels"]) for feature in features]
        rows = [
            torch.as_tensor(feature["input_ids"], dtype=torch.long)[: span.stop]
            for feature, span in zip(features, spans, strict=True)
        ]
        starts = [span.start for span in spans]
        ids = [
            sample_id(row[:start], row[start:], feature.get(SAMPLE_ID_COLUMN))
            for row, start, feature in zip(rows, starts, features, strict=True)
        ]
        return {
            **pad_rows(rows, starts, self.pad_token_id, self.pad_to_multiple_of),
            "prompt_lengths": torch.tensor(starts),
            "sample_ids": torch.tensor(ids),
        }


def checked_datasets(
    cfg: Any,
    meta: TrainDatasetMeta,
    distillation: Distillation,
    stop_ids: Sequence[int],
) -> TrainDatasetMeta:
    """Axolotl's data sets without the rows that cannot be used, and the step count that follows.

    Raises:
        DataError: see `check_rows`.
    """

    def check(dataset: Dataset, name: str, needs_completion: bool) -> Dataset:
        return check_rows(
            dataset,
            name=name,
            max_prompt_tokens=distillation.rollout.max_prompt_tokens,
            needs_completion=needs_completion,
            stop_ids=stop_ids,
        )

    train = check(meta.train_dataset, "training", distillation.method_row.needs_completions)
    # The validation loss is taken on the set's own completions, whatever the method.
    validation = meta.eval_dataset and check(meta.eval_dataset, "validation", True)
    steps = meta.total_num_steps
    if len(train) < len(meta.train_dataset):
        steps = calculate_total_num_steps(cfg, train)
        steps = min(steps, cfg.max_steps) if cfg.max_steps else steps
    return TrainDatasetMeta(train, validation, steps)


def check_rows(
    dataset: Dataset,
    *,
    name: str,
    max_prompt_tokens: int,
    needs_completion: bool,
    stop_ids: Sequence[int],
) -> Dataset:
    """Refuse rows that cannot be used, drop those whose prompt is too long, say what was found.

    Args:
        dataset: tokenised rows (input_ids, labels).
        name: how to call it in messages ("training" or "validation").
        max_prompt_tokens: longest prompt that is kept.
        needs_completion: whether a row without a trained token is an error.
        stop_ids: the stop set; completions should end in one of them.

    Returns:
        the rows to keep.

    Raises:
        DataError: rows without a prompt or without a needed completion, or no row left.
    """
    spans = [completion_span(labels) for labels in dataset["labels"]]
    starts = np.array([span.start for span in spans])
    lengths = np.array([span.stop - span.start for span in spans])

    _refuse(
        starts == 0,
        f"{name} row(s) have no prompt: their first token is already trained on, so there is nothing "
        "to continue. Give each row a user turn, or set train_on_inputs: false",
    )
    if needs_completion:
        _refuse(
            lengths == 0,
            f"{name} row(s) have no completion: all labels are -100. distillation.method or the "
            "validation set needs one; check roles_to_train and the chat template",
        )
    _warn_about_stops(dataset, spans, name, stop_ids)
    num_turns = sum(span.num_spans > 1 for span in spans)
    if num_turns:
        LOG.info(
            "%d of %d %s rows have several trained turns: the last one is the completion, all before "
            "it is the prompt.",
            num_turns,
            len(spans),
            name,
        )
    keep = np.flatnonzero(starts <= max_prompt_tokens)
    dropped = len(spans) - len(keep)
    if dropped:
        LOG.warning(
            "%d of %d %s rows are dropped: their prompts exceed distillation.rollout."
            "max_prompt_tokens = %d (the longest has %d tokens).",
            dropped,
            len(spans),
            name,
            max_prompt_tokens,
            starts.max(),
        )
    if len(keep) == 0:
        raise DataError(
            f"no {name} row is left: all {len(spans)} prompts exceed distillation.rollout."
            f"max_prompt_tokens = {max_prompt_tokens} (the shortest has {starts.min()} tokens). "
            "Raise it."
        )
    return dataset.select(keep) if dropped else dataset


def _refuse(bad: np.ndarray, message: str) -> None:
    if bad.any():
        first = np.flatnonzero(bad)[:5].tolist()
        raise DataError(f"{int(bad.sum())} of {len(bad)} {message} (first rows: {first}).")


def _warn_about_stops(
    dataset: Dataset, spans: Sequence[Span], name: str, stop_ids: Sequence[int]
) -> None:
    """A student whose rollouts end at tokens that the data never shows runs to the length limit."""
    ends = [
        ids[span.stop - 1]
        for ids, span in zip(dataset["input_ids"], spans, strict=True)
        if span.stop > span.start
    ]
    if not ends:
        return
    missing = sum(end not in stop_ids for end in ends)
    if missing:
        LOG.warning(
            "%d of %d %s completions do not end in a token of the stop set %s (the most common last "
            "token is %d). If that token ends a turn, add it to Axolotl's eot_tokens or to "
            "distillation.rollout.stop_token_ids.",
            missing,
            len(ends),
            name,
            sorted(stop_ids),
            Counter(ends).most_common(1)[0][0],
        )
