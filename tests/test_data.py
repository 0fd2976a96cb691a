"""Rows become prompts and completions with an identity of their own."""

from __future__ import annotations

import pickle
import struct
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from axolotl_skd.data import (
    DistillationCollator,
    Span,
    completion_span,
    pad_rows,
    sample_id,
)
from tests.token_rows import EOS, X, feature


def collator(pad: int = 0, **keywords: Any) -> DistillationCollator:
    # As Axolotl builds it.
    return DistillationCollator(
        SimpleNamespace(pad_token_id=pad),
        stop_ids=(EOS,),
        padding=True,
        return_tensors="pt",
        **keywords,
    )


def tensors(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


# Spans


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([X, X, 5, 6], Span(2, 4, 1)),
        ([X, 5, X, X, 6, 7], Span(4, 6, 2)),  # several turns: the last
        ([X, 5, 6, X, X], Span(1, 3, 1)),  # untrained tokens behind
        ([X, 5, X, 6, X, 7, X], Span(5, 6, 3)),
        ([5, 6], Span(0, 2, 1)),  # no prompt
        ([5, X, 6], Span(2, 3, 2)),
        ([X, X, X], Span(3, 3, 0)),  # nothing trained: all is prompt
        ([X, 0], Span(1, 2, 1)),  # token 0 is a token
        ([], Span(0, 0, 0)),
    ],
)
def test_the_completion_is_the_last_trained_span(labels: list[int], expected: Span) -> None:
    ids = [1] * len(labels)
    assert completion_span(labels, ids, [EOS]) == expected
    as_tensors = (torch.tensor(values, dtype=torch.long) for values in (labels, ids))
    assert completion_span(*as_tensors, [EOS]) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, +5, 2, +EOS], Span(1, 2, 1)),  # an EOS of its own behind the answer
        ([1, +5, 2, 2, 2, +EOS], Span(1, 2, 1)),  # as far away as Axolotl looks for it
        ([1, +5, 2, 2, 2, 2, +EOS], Span(6, 7, 2)),  # farther: a turn of its own
        ([1, +5, 2, +6], Span(3, 4, 2)),  # no stop token: a short second turn
        ([1, +5, 2, +6, +EOS], Span(3, 5, 2)),  # an answer with its EOS
        ([1, +EOS], Span(1, 2, 1)),  # nothing before it
        ([1, +5, +EOS, 2, +EOS], Span(1, 3, 1)),  # both ends trained
    ],
)
def test_an_eos_behind_the_answer_is_no_completion(row: list[int], expected: Span) -> None:
    """Tokens 1 and 2 are not trained here."""
    labels = [X if token in (1, 2) else token for token in row]
    assert completion_span(labels, row, [EOS]) == expected


# Sample ids


def test_sample_ids_are_pinned() -> None:
    # Rollouts are keyed by them: another value would change every run and every resumed one.
    assert sample_id([1, 2, 3], [4, 5]) == 7094554930719643474
    assert sample_id([1, 2, 3], [4, 5], given="row-7") == -5134715840842977822


def test_sample_ids_are_hashes_of_64_bit_little_endian_ids() -> None:
    def digest(data: bytes) -> bytes:
        return blake2b(data, digest_size=8).digest()

    parts = digest(struct.pack("<3q", 1, 2, 3)) + digest(struct.pack("<2q", 4, 5))
    assert sample_id([1, 2, 3], [4, 5]) == struct.unpack("<q", digest(parts))[0]


def test_sample_ids_tell_rows_apart() -> None:
    rows = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]), ([1, 2, 3], []), ([], [1, 2, 3])]
    assert len({sample_id(prompt, completion) for prompt, completion in rows}) == len(rows)


def test_an_id_column_wins_over_the_tokens() -> None:
    assert sample_id([1], [2], given="a") == sample_id([3, 4], [5], given="a")
    assert sample_id([1], [2], given="a") != sample_id([1], [2], given="b")
    assert sample_id([1], [2], given="a") != sample_id([1], [2])
    assert sample_id([1], [2], given=0) != sample_id([1], [2])  # 0 is an id, not a missing one
    batch = collator()([feature([1], [2], sample_id="a"), feature([3], [4])])
    assert batch["sample_ids"].tolist() == [sample_id([], [], "a"), sample_id([3], [4])]


def test_sample_ids_do_not_know_order_padding_or_type() -> None:
    rows = [feature([1, 2], [3, EOS]), feature([4], [5, 6, 7, EOS]), feature([8, 8, 8], [EOS])]
    forward = collator()(rows)["sample_ids"]
    backward = collator(pad=EOS, pad_to_multiple_of=64)(rows[::-1])["sample_ids"]
    alone = [collator()([row])["sample_ids"].item() for row in rows]
    assert forward.tolist() == backward.flip(0).tolist() == alone
    assert alone[0] == sample_id([1, 2], [3, EOS])
    assert alone[0] == sample_id(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3, EOS]))


def test_tokens_behind_the_completion_are_no_part_of_the_identity() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [X, 2, 3, X]}
    assert collator()([row])["sample_ids"].item() == sample_id([1], [2, 3])


# Padding


def test_rows_are_padded_on_the_right_and_trained_behind_their_prompts() -> None:
    batch = pad_rows(tensors([1, 2, 3, 4], [5, 6]), [2, 1], pad_token_id=0, multiple=None)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[X, X, 3, 4], [X, 6, X, X]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_an_eos_that_is_also_the_pad_stays_a_label() -> None:
    batch = pad_rows(tensors([1, 2, EOS], [3, EOS], [EOS, 4, EOS]), [1, 1, 1], EOS, None)
    assert batch["labels"].tolist() == [[X, 2, EOS], [X, EOS, X], [X, 4, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (4, 8), (5, 5), (64, 64)])
def test_widths_are_rounded_up_to_a_multiple(multiple: int | None, width: int) -> None:
    batch = pad_rows(tensors([1, 2, 3, 4, 5], [6]), [1, 1], 0, multiple)
    assert {tensor.shape for tensor in batch.values()} == {(2, width)}
    assert batch["attention_mask"].sum(1).tolist() == [5, 1]
    assert (batch["labels"] != X).sum(1).tolist() == [4, 0]


# The collator


def test_collated_rows_carry_prompts_and_the_last_completion_only() -> None:
    two_turns = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [X, 2, X, X, 5, X]}
    batch = collator(pad_to_multiple_of=4)([two_turns, feature([7, 8], [EOS])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [7, 8, EOS] + [0] * 5]
    assert batch["labels"].tolist() == [[X, X, X, X, 5, X, X, X], [X, X, EOS] + [X] * 5]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]
    assert batch["prompt_lengths"].tolist() == [4, 2]
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "prompt_lengths",
        "sample_ids",
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_row_without_a_completion_is_all_prompt() -> None:
    batch = collator()([{"input_ids": [1, 2, 3], "labels": [X, X, X]}])
    assert batch["prompt_lengths"].tolist() == [3]
    assert (batch["labels"] == X).all()


def test_the_collator_works_in_dataloader_processes() -> None:
    rows = [feature([i], [i + 1, EOS]) for i in range(1, 5)]
    here = collator(pad_to_multiple_of=4)
    # What is shipped: a few numbers, no tokenizer, model or trainer.
    assert vars(pickle.loads(pickle.dumps(here))) == {
        "pad_token_id": 0,
        "pad_to_multiple_of": 4,
        "stop_ids": (EOS,),
    }
    worked = list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=here))
    for batch, part in zip(worked, (rows[:2], rows[2:]), strict=True):
        for name, expected in here(part).items():
            assert torch.equal(batch[name], expected), name
