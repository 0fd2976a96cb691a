"""From tokenised rows to prompts and completions: splitting, identifying, padding, collating.

A row's completion is its last trained span (labels != -100), its prompt all before it. Nothing here
runs a model, so the collator can work in dataloader processes.

Legend: B rows, L longest row, P_b prompt length, T_b completion length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
MAX_GAP_TO_EOS = 3  # how far behind a turn Axolotl's chat_template strategy looks for an EOS
SAMPLE_ID_COLUMN = "sample_id"


@dataclass(frozen=True, slots=True)
class Span:
    """Where a row's completion lies: tokens [start, stop); the prompt is [0, start).

    `num_spans` counts the row's trained spans (assistant turns).
    """

    start: int
    stop: int
    num_spans: int


def completion_span(
    labels: Sequence[int], input_ids: Sequence[int], stop_ids: Sequence[int]
) -> Span:
    """The last trained span of a row; empty, behind everything, if nothing is trained.

    Axolotl also trains the first EOS within three tokens of a turn's end, so a chat template that
    puts something in between (Phi-3: `<|end|>`, a new line, EOS) leaves a span of its own behind the
    answer. Such a span of stop tokens alone ends the answer before it; it is no completion.

    Args:
        labels: of the row, IGNORE_INDEX where not trained.
        input_ids: its tokens.
        stop_ids: the stop set.
    """
    trained = np.asarray(labels) != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0)).tolist()
    while (
        len(edges) > 2
        and edges[-2] - edges[-3] <= MAX_GAP_TO_EOS
        and set(list(input_ids[edges[-2] : edges[-1]])) <= set(stop_ids)
    ):
        edges = edges[:-2]
    if not edges:
        return Span(len(trained), len(trained), 0)
    return Span(edges[-2], edges[-1], len(edges) // 2)


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

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        pad_to_multiple_of: int | None = None,
        **_: Any,
    ) -> None:
        """
        Args:
            tokenizer: only its pad token is used.
            stop_ids: the stop set, see `completion_span`.
            pad_to_multiple_of: see `pad_rows`.
            _: what Axolotl passes to every collator (`padding`, `return_tensors`).
        """
        self.pad_token_id: int = tokenizer.pad_token_id
        self.stop_ids = tuple(stop_ids)
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows with input_ids and labels -> `pad_rows` + prompt_lengths, sample_ids: int64 [B]."""
        spans = [
            completion_span(feature["labels"], feature["input_ids"], self.stop_ids)
            for feature in features
        ]
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
