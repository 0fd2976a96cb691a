"""Data sets before training: which rows can be used, which are dropped, and by whom.

Rows that cannot be distilled on are refused; those whose prompt is too long are dropped and counted,
and so are, once more, those that Axolotl dropped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset

from axolotl_skd.config import Distillation
from axolotl_skd.data import Span, completion_span
from axolotl_skd.rollout.stop_strings import StopStrings

LOG = get_logger(__name__)


class DataError(ValueError):
    """Rows that cannot be distilled on."""


def checked_datasets(
    cfg: Any,
    meta: TrainDatasetMeta,
    distillation: Distillation,
    stop_ids: Sequence[int],
    stop_strings: StopStrings | None = None,
) -> TrainDatasetMeta:
    """Axolotl's data sets without the rows that cannot be used, and the step count that follows.

    Raises:
        DataError: see `check_rows`.
    """

    def check(dataset: Dataset, name: str) -> Dataset:
        return check_rows(
            dataset,
            name=name,
            max_prompt_tokens=distillation.rollout.max_prompt_tokens,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
        )

    train = check(meta.train_dataset, "training")
    validation = meta.eval_dataset and check(meta.eval_dataset, "validation")
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
    stop_ids: Sequence[int],
    stop_strings: StopStrings | None = None,
) -> Dataset:
    """Refuse rows that cannot be used, drop those whose prompt is too long, say what was found.

    Args:
        dataset: tokenised rows (input_ids, labels).
        name: how to call it in messages ("training" or "validation").
        max_prompt_tokens: longest prompt that is kept.
        stop_ids: the stop set; completions should end in one of them,
        stop_strings: or with one of these.

    Returns:
        the rows to keep.

    Raises:
        DataError: rows without a prompt or without a completion, or no row left.
    """
    spans = [
        completion_span(labels, ids, stop_ids)
        for labels, ids in zip(dataset["labels"], dataset["input_ids"], strict=True)
    ]
    starts = np.array([span.start for span in spans])
    lengths = np.array([span.stop - span.start for span in spans])

    _refuse(
        starts == 0,
        f"{name} row(s) have no prompt: their first token is already trained on, so there is nothing "
        "to continue. Give each row a user turn, or set train_on_inputs: false",
    )
    # Also where the completion itself is not used: its beginning says where the prompt, with the
    # header of the answer, ends. A row of user turns alone would be continued without that header.
    _refuse(
        lengths == 0,
        f"{name} row(s) have no completion: all labels are -100, so there is no telling where an "
        "answer begins. Give each row an assistant turn; check roles_to_train and the chat template; "
        "for prompts without answers set the data set's type: axolotl_skd.prompts",
    )
    _warn_about_stops(dataset, spans, name, stop_ids, stop_strings)
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
    dataset: Dataset,
    spans: Sequence[Span],
    name: str,
    stop_ids: Sequence[int],
    stop_strings: StopStrings | None,
) -> None:
    """A student whose rollouts end at tokens that the data never shows runs to the length limit."""
    completions = [
        ids[span.start : span.stop]
        for ids, span in zip(dataset["input_ids"], spans, strict=True)
        if span.stop > span.start
    ]
    others = [ids for ids in completions if ids[-1] not in stop_ids]
    if stop_strings is not None:
        others = [ids for ids in others if stop_strings.ending(ids[:-1], ids[-1:]) is None]
    if others:
        LOG.warning(
            "%d of %d %s completions do not end in a token of the stop set %s (the most common last "
            "token is %d). If that token ends a turn, add it to Axolotl's eot_tokens or to "
            "distillation.rollout.stop_token_ids.",
            len(others),
            len(completions),
            name,
            sorted(stop_ids),
            Counter(ids[-1] for ids in others).most_common(1)[0][0],
        )


class _DropWatch(logging.Handler):
    """Collects what Axolotl says about rows that it drops; it keeps no count of its own."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)
        self.messages: list[str] = []
        self.reused = False

    def restate(self, sequence_len: int) -> None:
        """Say what was found."""
        for message in self.messages:
            LOG.warning(
                "Axolotl: %s. It counts prompt and completion against sequence_len = %d, also where "
                "only the prompt is used; raise sequence_len to keep such rows.",
                message,
                sequence_len,
            )
        if self.reused:
            LOG.info(
                "prepared data is reused: rows that Axolotl dropped when it was made (longer than "
                "sequence_len = %d) are not counted again. Delete dataset_prepared_path to see them.",
                sequence_len,
            )

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Dropped ") and "outside valid range" in message:
            self.messages.append(message)
        self.reused |= message.startswith("Loading prepared dataset from disk")


@contextmanager
def restating_dropped_rows(sequence_len: int) -> Iterator[None]:
    """Say once more, in one warning, which rows Axolotl dropped while data sets were loaded.

    It drops rows whose prompt and completion together exceed `sequence_len`, even where only the
    prompt is needed, in an INFO line among many.
    """
    watch = _DropWatch()
    loggers = [logging.getLogger(f"axolotl.utils.data.{name}") for name in ("utils", "shared")]
    for logger in loggers:
        logger.addHandler(watch)
    try:
        yield
    finally:  # also when nothing is left and Axolotl fails on that
        for logger in loggers:
            logger.removeHandler(watch)
        watch.restate(sequence_len)
