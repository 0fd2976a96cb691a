"""Data sets are checked before training: bad rows are refused or dropped, and it is said out loud."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from axolotl_skd.config import Distillation
from axolotl_skd.data_checks import (
    DataError,
    check_rows,
    checked_datasets,
    restating_dropped_rows,
)
from axolotl_skd.rollout.stop_strings import StopStrings
from tests.token_rows import EOS, X, feature


def rows(*features: dict[str, Any]) -> Dataset:
    return Dataset.from_list(list(features))


def check(dataset: Dataset, **keywords: Any) -> Dataset:
    return check_rows(
        dataset,
        **{
            "name": "training",
            "max_prompt_tokens": 8,
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


def test_rows_without_a_completion_are_refused() -> None:
    dataset = rows(*[feature([1, 2], [])] * 7, GOOD)
    with pytest.raises(DataError) as refusal:
        check(dataset, name="validation")
    message = str(refusal.value)
    assert message.startswith("7 of 8 validation row(s) have no completion")
    assert "(first rows: [0, 1, 2, 3, 4])" in message  # five are enough
    assert "roles_to_train" in message


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
    )
    check(dataset, stop_ids=(EOS, 8))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert "3 of 5 training completions do not end in a token of the stop set [8, 9]" in message
    assert "eot_tokens" in message and "stop_token_ids" in message

    caplog.clear()
    check(dataset, stop_ids=(EOS, 7, 6))
    assert not caplog.records


def test_a_completion_may_end_with_a_stop_string(caplog: pytest.LogCaptureFixture) -> None:
    stops = StopStrings(["67"], lambda ids: "".join(map(str, ids)))
    dataset = rows(GOOD, feature([1], [3, 6, 7]), feature([1], [67]), feature([1], [7, 6]))
    check(dataset, stop_strings=stops)
    (record,) = caplog.records
    assert "1 of 4 training completions do not end" in record.getMessage()


def test_the_usual_last_token_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check(rows(GOOD, *[feature([1], [2, 7])] * 3))
    assert "the most common last token is 7" in caplog.text


def test_rows_of_several_turns_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    turns = {"input_ids": [1, 2, 3, 4, EOS], "labels": [X, 2, X, 4, EOS]}
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


@pytest.mark.parametrize("method", ["skd", "seqkd", "supervised_kd", "sft"])
def test_every_set_needs_completions_whatever_the_method(method: str) -> None:
    """Without one there is no header of an answer at the end of the prompt."""
    bare = rows(GOOD, feature([1], []))
    for sets, name in (((bare, None), "training"), ((rows(GOOD), bare), "validation")):
        with pytest.raises(DataError, match=f"1 of 2 {name}"):
            checked_datasets(
                training_cfg(), TrainDatasetMeta(*sets, 1), settings(method), stop_ids=[EOS]
            )


# Rows that Axolotl drops


def our_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "axolotl_skd.data_checks" and record.levelname == "WARNING"
    ]


def test_rows_dropped_by_axolotl_are_said_once_more(caplog: pytest.LogCaptureFixture) -> None:
    # Axolotl's own function, so that a change of its wording is noticed.
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 20, 4, 21)]})
    cfg = DictDefault({"min_sample_len": 2, "is_preprocess": True})
    with restating_dropped_rows(16):
        assert len(handle_long_seq_in_dataset(dataset, 16, cfg)) == 2
        assert not our_warnings(caplog)  # only when all is loaded
    (message,) = our_warnings(caplog)
    assert "Dropped 2 sequences" in message
    assert "sequence_len = 16" in message and "raise sequence_len" in message


def test_nothing_dropped_is_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * 3]})
    with restating_dropped_rows(16):
        handle_long_seq_in_dataset(dataset, 16, DictDefault({"min_sample_len": 2}))
    assert not our_warnings(caplog)


def test_the_watch_ends_with_the_loading(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("axolotl.utils.data.utils")
    before = list(logger.handlers)
    with pytest.raises(OSError, match="disk"), restating_dropped_rows(16):
        raise OSError("disk")
    with restating_dropped_rows(16):
        pass
    logger.info("Dropped 3 sequences")
    assert logger.handlers == before
    assert not our_warnings(caplog)
