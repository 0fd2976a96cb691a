"""Language models whose logits are written by hand, and batches for them.

No weights, no attention: the next-token logits of a `ScriptedLM` are a function of the prefix that
it was shown, which it reads back from its cache slot by slot. So wrong placement, a stale slot that
is read, a row mixed up by compaction or a position out of range show up as a wrong token or as a
failed assertion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, Rollout, SamplingParams

VOCAB_SIZE = 50
Script = Callable[[list[int]], list[int]]


class ScriptedCache:
    """The tokens that were fed, in their slots, -1 where none was."""

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self.tokens = torch.full((num_rows, num_slots), -1)
        self.rows = torch.arange(num_rows)  # which of the first ones are left

    def keep_rows(self, index: Tensor) -> None:
        self.tokens, self.rows = self.tokens[index], self.rows[index]


class ScriptedLM:
    """Prefix -> tokens by falling logit (100, 99, ...; others 0). Hidden states are logits."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.device = torch.device("cpu")
        self.vocab_size = VOCAB_SIZE
        self.fed: list[list[list[int]]] = []  # per decoding forward and row: its positions
        self.rows: list[list[int]] = []  # per decoding forward: which rows of the first cache
        self.prefilled: list[list[int]] = []  # per prompt forward: the rows of the cache

    def new_cache(self, num_rows: int, num_slots: int) -> ScriptedCache:
        return ScriptedCache(num_rows, num_slots)

    def prefill(self, ids: Tensor, rows: Tensor, cache: ScriptedCache) -> None:
        # A row that takes a finished one's place finds its slots: they must not matter.
        cache.tokens[rows, : ids.shape[1]] = ids
        self.prefilled.append(rows.tolist())

    def forward(self, ids: Tensor, positions: Tensor, cache: ScriptedCache, longest: int) -> Tensor:
        num_slots = cache.tokens.shape[1]
        assert ids.shape == positions.shape
        assert len(ids) == len(cache.tokens), "fed other rows than the cache holds"
        assert int(positions.min()) >= 0 and int(positions.max()) < min(longest, num_slots)
        cache.tokens.scatter_(1, positions, ids)
        self.fed.append(positions.tolist())
        self.rows.append(cache.rows.tolist())
        return torch.stack(
            [
                torch.stack([self._logits(cache.tokens[row, : position + 1]) for position in at])
                for row, at in enumerate(positions.tolist())
            ]
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def _logits(self, prefix: Tensor) -> Tensor:
        assert int(prefix.min()) >= 0, "a slot before the query was never filled"
        logits = torch.zeros(VOCAB_SIZE)
        for rank, token in enumerate(self.script(prefix.tolist())):
            logits[token] = 100 - rank
        return logits


def after(prefix: list[int], *steps: int) -> list[int]:
    """The tokens `steps` further than the last one."""
    return [(prefix[-1] + step) % VOCAB_SIZE for step in steps]


def count_up(prefix: list[int]) -> list[int]:
    """3 -> 4 -> 5 ..."""
    return after(prefix, 1)


def skip_one(prefix: list[int]) -> list[int]:
    """3 -> 5 -> 7 ...: refuses counting up with K = 1, tolerates it with K = 2."""
    return after(prefix, 2, 1)


def skip_before_multiples_of_four(prefix: list[int]) -> list[int]:
    """Counts up too, but jumps over the multiples of four."""
    return after(prefix, 2) if prefix[-1] % 4 == 3 else after(prefix, 1)


def batch(prompts: list[list[int]], max_new: list[int]) -> Prompts:
    streams = row_streams(0, 0, torch.arange(len(prompts)))
    return Prompts(tuple(torch.tensor(p) for p in prompts), streams, torch.tensor(max_new))


def params_of(
    num_draft_tokens: int, top_k: int = 1, stop_ids: tuple[int, ...] = (), **more: Any
) -> SamplingParams:
    return SamplingParams(
        num_draft_tokens=num_draft_tokens,
        teacher_top_k=top_k,
        student_temperature=1.0,
        student_top_p=1e-6,
        teacher_temperature=1.0,
        teacher_top_p=1e-6,
        stop_token_ids=stop_ids,
        **more,
    )


def completions(result: Rollout) -> list[list[int]]:
    return [ids.tolist() for ids in result.unpadded()]
