"""Completion sources: where the tokens of a training batch come from.

A source is asked once per optimizer step, for the whole accumulation window, with the weights of that
moment: rollouts are never older than the step they train.

Legend: B rows of a micro-batch, N completion tokens of a micro-batch, H hidden size of the teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from axolotl_skd.data import pad_rows
from axolotl_skd.metrics import Ratio, rollout_metrics
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, Rollout, SamplingParams

Batch = dict[str, Any]
"""`DistillationCollator`'s batch, plus `stored_hidden` where a rollout kept the teacher's states."""


@dataclass(frozen=True, slots=True)
class StoredHidden:
    """Teacher states [N, H] that predict a micro-batch's completion tokens, row by row.

    A record rather than a bare tensor, so that nobody who prepares inputs casts or moves it.
    """

    states: Tensor


class CompletionSource(Protocol):
    def complete(
        self, batches: Sequence[Batch], epoch: int
    ) -> tuple[list[Batch], dict[str, Ratio]]:
        """The batches to train on, and what to log about how they came to be."""


class DatasetSource:
    """The data set's own completions, as collated."""

    def complete(
        self, batches: Sequence[Batch], epoch: int
    ) -> tuple[list[Batch], dict[str, Ratio]]:
        return list(batches), {}


class RolloutSource:
    """Completions sampled on the spot, one ragged batch for all micro-batches of the window."""

    def __init__(
        self,
        sample: Callable[[Prompts, SamplingParams], Rollout],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        seed: int,
        pad_token_id: int,
        pad_to_multiple_of: int | None,
    ) -> None:
        """
        Args:
            sample: one of the engine's samplers.
            params: how to sample.
            max_new_tokens: longest completion.
            seed: of the keyed random numbers.
            pad_token_id, pad_to_multiple_of: as in `pad_rows`.
        """
        self.params = params
        self._sample = sample
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._pad_token_id = pad_token_id
        self._pad_to_multiple_of = pad_to_multiple_of

    def complete(
        self, batches: Sequence[Batch], epoch: int
    ) -> tuple[list[Batch], dict[str, Ratio]]:
        started = time.perf_counter()
        prompts = self._prompts(batches, epoch)
        rollout = self._sample(prompts, self.params)
        completed, start = [], 0
        for batch in batches:
            stop = start + len(batch["sample_ids"])
            part = rollout.select(start, stop)
            completed.append(self._batch(prompts.ids[start:stop], part, batch))
            start = stop
        return completed, rollout_metrics(rollout, time.perf_counter() - started)

    def _prompts(self, batches: Sequence[Batch], epoch: int) -> Prompts:
        ids = tuple(
            row[:length]
            for batch in batches
            for row, length in zip(
                batch["input_ids"], batch["prompt_lengths"].tolist(), strict=True
            )
        )
        sample_ids = torch.cat([batch["sample_ids"] for batch in batches])
        return Prompts(
            ids=ids,
            streams=row_streams(self._seed, epoch, sample_ids),
            max_new_tokens=torch.full_like(sample_ids, self._max_new_tokens),
        )

    def _batch(self, prompt_ids: Sequence[Tensor], rollout: Rollout, batch: Batch) -> Batch:
        rows = [
            torch.cat([prompt, rollout.row(index).to(prompt.device)])
            for index, prompt in enumerate(prompt_ids)
        ]
        lengths = [len(prompt) for prompt in prompt_ids]
        rolled_out: Batch = {
            **pad_rows(rows, lengths, self._pad_token_id, self._pad_to_multiple_of),
            "prompt_lengths": batch["prompt_lengths"],
            "sample_ids": batch["sample_ids"],
        }
        hidden = rollout.teacher_hidden
        if hidden is not None:
            mask = rollout.completion_mask.to(hidden.device)
            rolled_out["stored_hidden"] = StoredHidden(hidden[mask])
        return rolled_out
