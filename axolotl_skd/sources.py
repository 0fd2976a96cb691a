"""Completion sources: where the tokens of a training batch come from.

A source is asked once per optimizer step, for the whole accumulation window, with the weights of that
moment: rollouts are never older than the step they train.

Legend: B rows of a micro-batch, N completion tokens of a micro-batch, H hidden size of the teacher.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from axolotl_skd.data import pad_rows
from axolotl_skd.metrics import SKIPPED_ROWS, Ratio, rollout_metrics
from axolotl_skd.rollout.sampling import Role, keyed_uniform, row_streams
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source
from axolotl_skd.sound_rows import sample_sound_rows
from axolotl_skd.top_k import TopKPolicy

LOG = logging.getLogger(__name__)

Batch = dict[str, Any]
"""`DistillationCollator`'s batch, plus, once completed,

- `streams`: int64 [B], the random stream of each row (`sampling.row_streams`);
- `rolled_out`: bool [B], rows whose completion was sampled, absent where none was;
- `stored_hidden`: where a rollout kept the teacher's states.
"""


@dataclass(frozen=True, slots=True)
class StoredHidden:
    """What verification knew of a micro-batch's completion tokens.

    A record rather than bare tensors, so that nobody who prepares inputs casts or moves them.

    Attributes:
        states: [n, H], the teacher's states that predict the tokens of the rows in `rows`, in order.
        rows: bool [B] on the CPU, True where the row was verified.
    """

    states: Tensor
    rows: Tensor


class CompletionSource(Protocol):
    def complete(
        self, batches: Sequence[Batch], epoch: int, progress: float
    ) -> tuple[list[Batch], dict[str, Ratio]]:
        """The batches to train on, and what to log about how they came to be.

        Args:
            batches: one accumulation window, as collated.
            epoch: of the window.
            progress: share of all optimizer steps that are done.
        """


class DatasetSource:
    """The data set's own completions, as collated."""

    def __init__(self, seed: int) -> None:
        """
        Args:
            seed: of the keyed random numbers.
        """
        self._seed = seed

    def complete(
        self, batches: Sequence[Batch], epoch: int, progress: float
    ) -> tuple[list[Batch], dict[str, Ratio]]:
        return [
            {**batch, "streams": row_streams(self._seed, epoch, batch["sample_ids"])}
            for batch in batches
        ], {}


class RolloutSource:
    """Completions sampled on the spot, one ragged batch for all micro-batches of the window.

    A share of the rows may keep the data set's completion instead; a coin per sequence, keyed like
    the samples themselves, so the same on any number of ranks and after resuming.
    """

    def __init__(
        self,
        sample: Callable[[Prompts, SamplingParams], Rollout],
        source: Source,
        params: SamplingParams,
        *,
        share: Callable[[float], float],
        num_rollouts: int = 1,
        once: bool = False,
        mask_truncated: bool = False,
        max_new_tokens: int,
        seed: int,
        pad_token_id: int,
        pad_to_multiple_of: int | None,
        top_k: TopKPolicy | None = None,
        skip_non_finite: bool = False,
        asking: Callable[[], AbstractContextManager[Any]] = nullcontext,
        describe: Callable[[Tensor], str] = str,
    ) -> None:
        """
        Args:
            sample: one of the engine's samplers.
            source: which model(s) it samples from.
            params: how to sample.
            share: probability that a sequence is rolled out, by the share of steps done.
            num_rollouts: completions per rolled-out prompt: a micro-batch grows by as many rows.
            once: sample as in the first epoch in all of them.
            mask_truncated: keep rollouts that reached the longest length out of the loss.
            max_new_tokens: longest completion.
            seed: of the keyed random numbers.
            pad_token_id, pad_to_multiple_of: as in `pad_rows`.
            top_k: K of each step, None where no top-K test is made.
            skip_non_finite: leave rows out of the loss for which nothing can be sampled.
            describe: a prompt int64 [P] for people.
            asking: entered once a window, around all that is sampled (`sharding.AtHand.asking`).
        """
        self._sample = sample
        self._source = source
        self._params = params
        self._share = share
        self._num_rollouts = num_rollouts
        self._once = once
        self._mask_truncated = mask_truncated
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._pad_token_id = pad_token_id
        self._pad_to_multiple_of = pad_to_multiple_of
        self._top_k = top_k
        self._skip_non_finite = skip_non_finite
        self._asking = asking
        self._describe = describe
        self._warned = False

    def complete(
        self, batches: Sequence[Batch], epoch: int, progress: float
    ) -> tuple[list[Batch], dict[str, Ratio]]:
        started = time.perf_counter()
        if self._top_k is not None:
            self._params = replace(self._params, teacher_top_k=self._top_k.choose(progress))
        batches = [self._expand(batch, epoch, progress) for batch in batches]
        with self._asking():
            batches, rollout = self._roll_out(batches)
        completed, start = [], 0
        for batch in batches:
            stop = start + int((batch["rolled_out"] & ~batch["skipped"]).sum())
            part = rollout.select(start, stop) if stop > start else None
            completed.append(self._batch(batch, part))
            start = stop
        if self._mask_truncated and rollout is not None:
            self._warn_if_all_truncated(rollout)
        metrics = rollout_metrics(rollout, self._source, time.perf_counter() - started)
        metrics["rollout/share"] = (start, sum(len(batch["rolled_out"]) for batch in batches))
        if self._skip_non_finite:
            metrics[SKIPPED_ROWS] = (sum(int(batch["skipped"].sum()) for batch in batches), 0)
        if self._top_k is not None:
            metrics["skd/teacher_top_k"] = (self._params.teacher_top_k, 1)
            self._top_k.observe(*metrics["skd/acceptance_rate"])
        return completed, metrics

    def _warn_if_all_truncated(self, rollout: Rollout) -> None:
        """Once: a step in which every rollout is masked may be the first of many."""
        if self._warned or not (rollout.finish_reasons == FinishReason.LENGTH).all():
            return
        self._warned = True
        LOG.warning(
            "all rollouts of a step ran to distillation.rollout.max_new_tokens (%d) and are masked by "
            "mask_truncated: nothing is learned from them. See rollout/truncated_share; raise "
            "max_new_tokens, or check that the stop set has the token that ends a turn.",
            self._max_new_tokens,
        )

    def _expand(self, batch: Batch, epoch: int, progress: float) -> Batch:
        """The batch with as many rows of each prompt as it gets rollouts, a coin deciding which do.

        Adds `streams` and `rolled_out` (on the CPU).
        """
        samples = batch["sample_ids"]
        coins = keyed_uniform(
            row_streams(self._seed, epoch, samples), torch.zeros_like(samples), Role.SOURCE
        )
        chosen = (coins < self._share(progress)).cpu()
        copies = torch.where(chosen, self._num_rollouts, 1)
        rows = torch.arange(len(chosen)).repeat_interleave(copies)
        # Which of its prompt's rollouts each row is.
        index = torch.arange(len(rows)) - (copies.cumsum(0) - copies)[rows]
        device_rows = rows.to(samples.device)
        expanded = {name: values[device_rows] for name, values in batch.items()}
        streams = row_streams(
            self._seed,
            0 if self._once else epoch,
            expanded["sample_ids"],
            index.to(samples.device),
        )
        return {**expanded, "streams": streams, "rolled_out": chosen[rows]}

    def _roll_out(self, batches: Sequence[Batch]) -> tuple[list[Batch], Rollout | None]:
        """Sample for all chosen rows, and mark those that could not be sampled.

        Returns:
            the batches with `skipped` (bool [B] on the CPU), and the rollout of the other chosen rows.
        """
        ids, keys, samples = [], [], []
        for batch in batches:
            rows, streams = batch["rolled_out"], batch["streams"]
            lengths = batch["prompt_lengths"].tolist()
            ids += [batch["input_ids"][row, : lengths[row]] for row in _indices(rows)]
            keys.append(streams[rows.to(streams.device)])
            samples += batch["sample_ids"][rows.to(streams.device)].tolist()
        sound, rollout = torch.ones(0, dtype=torch.bool), None
        if ids:
            key = torch.cat(keys)
            rollout, sound = sample_sound_rows(
                self._sample,
                Prompts(tuple(ids), key, torch.full_like(key, self._max_new_tokens)),
                self._params,
                name=lambda row: f"{samples[row]} ({self._describe(ids[row])!r})",
                skip=self._skip_non_finite,
            )
        marked, sound = [], iter(sound.tolist())
        for batch in batches:
            skipped = [chosen and not next(sound) for chosen in batch["rolled_out"].tolist()]
            marked.append({**batch, "skipped": torch.tensor(skipped, dtype=torch.bool)})
        return marked, rollout

    def _batch(self, batch: Batch, rollout: Rollout | None) -> Batch:
        """An expanded micro-batch with new completions in the chosen rows, in one padding."""
        batch = dict(batch)
        skipped, prompt_lengths = batch.pop("skipped"), batch["prompt_lengths"].tolist()
        chosen = batch["rolled_out"] & ~skipped
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(batch["input_ids"], lengths, strict=True)]
        for row in _indices(skipped):
            rows[row] = rows[row][: prompt_lengths[row]]
        completions = [] if rollout is None else rollout.unpadded()
        for row, ids in zip(_indices(chosen), completions, strict=True):
            completion = ids.to(rows[row].device)
            rows[row] = torch.cat([rows[row][: prompt_lengths[row]], completion])
        masked = skipped.clone()
        if self._mask_truncated and rollout is not None:
            masked[chosen] = rollout.finish_reasons.cpu() == FinishReason.LENGTH
        # A masked row is trained on from its end, so nowhere.
        trained_from = [
            len(row) if off else length
            for row, length, off in zip(rows, prompt_lengths, masked.tolist(), strict=True)
        ]
        completed = {
            **batch,
            **pad_rows(rows, trained_from, self._pad_token_id, self._pad_to_multiple_of),
        }
        hidden = None if rollout is None else rollout.teacher_hidden
        if hidden is not None:
            kept = ~masked[chosen].to(hidden.device)
            mask = rollout.completion_mask.to(hidden.device) & kept[:, None]
            completed["stored_hidden"] = StoredHidden(hidden[mask], chosen & ~masked)
        return completed


def _indices(rows: Tensor) -> list[int]:
    """Positions of True, bool [B] -> ints."""
    return rows.nonzero()[:, 0].tolist()
