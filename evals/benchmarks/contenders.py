"""The contenders of a rollout, each as a cell: what it runs and what it says of itself.

Every contender delivers completions *and* the teacher's hidden states at their positions, which is what
a distillation loss needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import torch
from algorithm1 import cached_rows, recompute_teacher, uncached
from engines import acceptance, count_rounds, new_engine
from floor import Round
from harness import Cell, Facts, digest
from on_policy import generate, teacher_states
from work import PUBLISHED_DRAFT, Draft, Work

from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.types import Prompts


def naive(work: Work, rate: float | None) -> Cell:
    return _row_by_row(work, rate, "naive", uncached, repeats=1)


def batch1(work: Work, rate: float | None) -> Cell:
    return _row_by_row(work, rate, "batch 1 + teacher", cached_rows, repeats=2)


def _row_by_row(
    work: Work,
    rate: float | None,
    name: str,
    algorithm: Callable[..., Sequence[Sequence[int]]],
    repeats: int,
) -> Cell:
    """One of the forms of Algorithm 1 that know no batch, and a teacher forward per row."""
    params = work.params(PUBLISHED_DRAFT)

    def run() -> Facts:
        rows = algorithm(work.pair, work.prompts, params, PUBLISHED_DRAFT, acceptance(rate))
        recompute_teacher(work.pair, work.prompts, rows)
        return _facts(rows)

    return work.cell(name, run, rate, repeats=repeats)


def on_policy(work: Work, batch_size: int | None = None, repeats: int | None = None) -> Cell:
    params = work.params(1)

    def run() -> Facts:
        rows: list[list[int]] = []
        for part in _batches(work.prompts, batch_size):
            ids, mask, completions = generate(work.pair, part, params)
            teacher_states(work.pair, ids, mask)
            rows += completions
        return _facts(rows)

    return work.cell("generate + teacher", run, repeats=repeats)


def gkd(work: Work, stack: ExitStack, force_cache: bool, repeats: int | None = None) -> Cell:
    size, tokens = len(work.prompts.ids), int(work.prompts.max_new_tokens.max())
    made = []

    def prepare() -> None:
        from gkd import gkd_trainer  # TRL takes seconds to import

        if not made:
            made.append(
                stack.enter_context(gkd_trainer(work.pair, tokens, size, force_cache=force_cache))
            )
        work.pair.student.eval()

    def run() -> Facts:
        from gkd import gkd_generate

        ids, mask = gkd_generate(made[0], work.prompts)
        teacher_states(work.pair, ids, mask)
        return _facts(ids[:, -tokens:].tolist())

    cell = work.cell("GKD, cache forced" if force_cache else "GKD as shipped", run, repeats=repeats)
    return replace(cell, prepare=prepare)


def ours(
    work: Work,
    rate: float | None,
    draft: Draft,
    *,
    batch_size: int | None = None,
    refill: bool = False,
    repeats: int | None = None,
) -> Cell:
    """The engine: on all rows at once, or on `batch_size` in flight (`refill`) or in turn.

    What `auto` learns in a run it keeps for the next, as in training; every draft length has an untimed
    run before.
    """
    params = work.params(draft)

    @cache
    def engine_and_rounds() -> tuple[RolloutEngine, Counter[Round]]:
        engine = new_engine(work.pair, acceptance(rate), batch_size if refill else None)
        return engine, count_rounds(engine)

    @torch.no_grad()
    def run() -> Facts:
        engine, rounds = engine_and_rounds()
        rounds.clear()
        rows: list[list[int]] = []
        accepted = proposed = 0
        for part in _batches(work.prompts, None if refill else batch_size):
            rollout = engine.interleave(part, params)
            rows += [row.tolist() for row in rollout.unpadded()]
            accepted += int(rollout.accepted_mask.sum())
            proposed += int(rollout.num_proposed.sum())
        facts = _facts(rows)
        return facts | {
            "own share": accepted / facts["tokens"],
            "draft efficiency": facts["tokens"] / proposed,
            "rounds": [[*kind, count] for kind, count in sorted(rounds.items())],
        }

    @cache
    def warm_up() -> None:
        run()

    how = (
        "" if batch_size is None else f", {batch_size} rows, " + ("refill" if refill else "in turn")
    )
    cell = work.cell(f"ours G = {draft}{how}", run, rate, repeats, draft=draft)
    return replace(cell, prepare=warm_up)


def _batches(prompts: Prompts, size: int | None) -> Iterator[Prompts]:
    """The rows in batches of `size`, or all at once."""
    size = size or len(prompts.ids)
    for i in range(0, len(prompts.ids), size):
        rows = slice(i, i + size)
        yield Prompts(prompts.ids[rows], prompts.streams[rows], prompts.max_new_tokens[rows])


def _facts(rows: Sequence[Sequence[int]]) -> Facts:
    return {"tokens": sum(map(len, rows)), "digest": digest([list(row) for row in rows])}
