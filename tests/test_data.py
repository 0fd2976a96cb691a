"""Rows become prompts and completions with an identity of their own; bad rows are said out loud."""

from __future__ import annotations

import pickle
import struct
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from torch.utils.data import DataLoader

from axolotl_skd.config import Distillation
from axolotl_skd.data import (
    DataError,
    DistillationCollator,
    Span,
    check_rows,
    checked_datasets,
    completion_span,
    pad_rows,
    sample_id,
)

X = -100
EOS = 9


def feature(prompt: list[int], completion: list[int], **more: Any) -> dict[str, Any]:
    return {
        "input_ids": prompt + completion,
        "labels": [X] * len(prompt) + completion,
        "attention_mask": [1] * len(prompt + completion),
        **more,
    }


def collator(pad: int = 0, **keywords: Any) -> DistillationCollator:
    # As Axolotl builds it.
    return DistillationCollator(
        SimpleNamespace(pad_token_id=pad), padding=True, return_tensors="pt", **keywords
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
    assert completion_span(labels) == expected
    assert completion_span(torch.tensor(labels, dtype=torch.long)) == expected


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
    # What is shipped: two numbers, no tokenizer, model or trainer.
    assert vars(pickle.loads(pickle.dumps(here))) == {"pad_token_id": 0, "pad_to_multiple_of": 4}
    worked = list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=here))
    for batch, part in zip(worked, (rows[:2], rows[2:]), strict=True):
        for name, expected in here(part).items():
            assert torch.equal(batch[name], expected), name


# Checks


def rows(*features: dict[str, Any]) -> Dataset:
    return Dataset.from_list(list(features))


def check(dataset: Dataset, **keywords: Any) -> Dataset:
    return check_rows(
        dataset,
        **{
            "name": "training",
            "max_prompt_tokens": 8,
            "needs_completion": True,
            "stop_ids": [EOS],
            **keywords,
        },
    )


GOOD = feature([1, 2], [3, EOS])


def test_good_rows_pass_untouched_and_unmentioned(caplog: pytest.LogCaptureFixture) -> None:
    dataset = rows(GOOD, feature([4], [EOS]))
    assert check(dataset) is dataset
    assert not caplog.records


def test_rows_without_a_prompt_are_refused() -> None:
    dataset = rows(GOOD, feature([], [1, EOS]), GOOD, feature([], [2, EOS]))
    with pytest.raises(DataError) as refusal:
        check(dataset)
    message = str(refusal.value)
    assert message.startswith("2 of 4 training row(s) have no prompt")
    assert "(first rows: [1, 3])" in message
    assert "train_on_inputs: false" in message


def test_rows_without_a_completion_are_refused_where_one_is_needed() -> None:
    dataset = rows(*[feature([1, 2], [])] * 7, GOOD)
    with pytest.raises(DataError) as refusal:
        check(dataset, name="validation")
    message = str(refusal.value)
    assert message.startswith("7 of 8 validation row(s) have no completion")
    assert "(first rows: [0, 1, 2, 3, 4])" in message  # five are enough
    assert "roles_to_train" in message
    assert check(dataset, needs_completion=False) is dataset


def test_long_prompts_are_dropped_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    dataset = rows(feature([1] * 3, [EOS]), feature([2] * 4, [EOS]), feature([3] * 6, [EOS]), GOOD)
    kept = check(dataset, max_prompt_tokens=3)
    assert kept["input_ids"] == [[1, 1, 1, EOS], [1, 2, 3, EOS]]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "2 of 4 training rows are dropped: their prompts exceed distillation.rollout."
        "max_prompt_tokens = 3 (the longest has 6 tokens)."
    )


def test_the_completion_does_not_count_as_prompt(caplog: pytest.LogCaptureFixture) -> None:
    dataset = rows(feature([1, 2, 3], [4] * 20 + [EOS]))
    assert check(dataset, max_prompt_tokens=3) is dataset
    assert not caplog.records


def test_no_row_left_is_an_error() -> None:
    with pytest.raises(DataError) as refusal:
        check(rows(feature([1] * 5, [EOS]), feature([1] * 4, [EOS])), max_prompt_tokens=3)
    message = str(refusal.value)
    assert "no training row is left: all 2 prompts exceed" in message
    assert "max_prompt_tokens = 3 (the shortest has 4 tokens)" in message


def test_completions_that_end_in_no_stop_token_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = rows(
        GOOD,
        feature([1], [2, 7]),
        feature([1], [3, 7]),
        feature([1], [3, 6]),
        {"input_ids": [1, 2, EOS, 5], "labels": [X, 2, EOS, X]},  # ends in EOS all the same
        feature([1, 2], []),
    )
    check(dataset, stop_ids=(EOS, 8), needs_completion=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert "3 of 5 training completions do not end in a token of the stop set [8, 9]" in message
    assert "eot_tokens" in message and "stop_token_ids" in message

    caplog.clear()
    check(dataset, stop_ids=(EOS, 7, 6), needs_completion=False)
    assert not caplog.records


def test_the_usual_last_token_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check(rows(GOOD, *[feature([1], [2, 7])] * 3))
    assert "the most common last token is 7" in caplog.text


def test_rows_of_several_turns_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    turns = {"input_ids": [1, 2, 3, EOS], "labels": [X, 2, X, EOS]}
    check(rows(turns, GOOD, turns))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("2 of 3 training rows have several trained turns")


# Whole data sets


def settings(method: str = "skd", max_prompt_tokens: int = 3) -> Distillation:
    return Distillation.model_validate(
        {
            "method": method,
            "teacher": {"base_model": "t"},
            "rollout": {"max_prompt_tokens": max_prompt_tokens},
        }
    )


def training_cfg(**keys: Any) -> DictDefault:
    return DictDefault({"num_epochs": 2, "batch_size": 2, "micro_batch_size": 2, **keys})


def test_dropped_training_rows_lower_the_step_count() -> None:
    train = rows(*[GOOD] * 6, *[feature([1] * 4, [EOS])] * 4)
    meta = checked_datasets(
        training_cfg(), TrainDatasetMeta(train, None, 10), settings(), stop_ids=[EOS]
    )
    assert len(meta.train_dataset) == 6
    assert meta.total_num_steps == 6  # 6 rows x 2 epochs / 2
    assert meta.eval_dataset is None


@pytest.mark.parametrize(("max_steps", "expected"), [(4, 4), (100, 6)])
def test_max_steps_still_bounds_the_step_count(max_steps: int, expected: int) -> None:
    train = rows(*[GOOD] * 6, feature([1] * 4, [EOS]))
    cfg = training_cfg(max_steps=max_steps)
    meta = checked_datasets(cfg, TrainDatasetMeta(train, None, 7), settings(), stop_ids=[EOS])
    assert meta.total_num_steps == expected


def test_nothing_dropped_leaves_axolotls_step_count() -> None:
    meta = TrainDatasetMeta(rows(GOOD, GOOD), None, 123)
    checked = checked_datasets(training_cfg(), meta, settings(), stop_ids=[EOS])
    assert checked.total_num_steps == 123
    assert checked.train_dataset is meta.train_dataset


def test_validation_rows_are_dropped_without_touching_the_steps() -> None:
    validation = rows(GOOD, feature([1] * 4, [EOS]))
    meta = TrainDatasetMeta(rows(GOOD), validation, 1)
    checked = checked_datasets(training_cfg(), meta, settings(), stop_ids=[EOS])
    assert len(checked.eval_dataset) == 1
    assert checked.total_num_steps == 1


@pytest.mark.parametrize(
    ("method", "training_needs_completions"),
    [("skd", False), ("seqkd", False), ("supervised_kd", True), ("sft", True), ("gkd", True)],
)
def test_which_sets_need_completions(method: str, training_needs_completions: bool) -> None:
    bare = rows(GOOD, feature([1], []))
    meta = TrainDatasetMeta(bare, None, 1)
    if training_needs_completions:
        with pytest.raises(DataError, match="1 of 2 training"):
            checked_datasets(training_cfg(), meta, settings(method), stop_ids=[EOS])
    else:
        checked_datasets(training_cfg(), meta, settings(method), stop_ids=[EOS])
    # The validation loss is taken on the set's own completions, whatever the method.
    with pytest.raises(DataError, match="1 of 2 validation"):
        checked_datasets(
            training_cfg(), TrainDatasetMeta(rows(GOOD), bare, 1), settings(method), stop_ids=[EOS]
        )
