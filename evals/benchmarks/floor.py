"""The least a rollout can cost: its forwards, run back to back by stock transformers, nothing else.

floor = prefill + sum over rounds of (G c_s(R) + c_t(R, G)), R the rows in flight, G the draft length
of that round, c_s and c_t one forward with logits on a stock cache of the rollout's middle context.
What a rollout takes above it is sampling, verification, masks, caches and bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from harness import Cell, Facts, Measurement
from models import Pair
from transformers import DynamicCache, PreTrainedModel

FORWARDS = 3  # per timed run
Round = tuple[int, int]
"""(rows in flight, draft length)"""


def cost_cells(
    pair: Pair, rounds: Iterable[Round], num_rows: int, prompt_tokens: int, context: int
) -> list[Cell]:
    """The forwards of which these rounds consist, each a cell of `FORWARDS` forwards."""
    models = {"student": pair.student, "teacher": pair.teacher}
    kinds = sorted(set(rounds))
    students = sorted({("student", rows, 1) for rows, _ in kinds})
    teachers = [("teacher", rows, size) for rows, size in kinds]
    cells = [
        Cell(
            _prefill_name(role, num_rows),
            _prefill(model, num_rows, prompt_tokens),
            {"prompt": prompt_tokens},
        )
        for role, model in models.items()
    ]
    for role, rows, size in students + teachers:
        fill, run = _forward(models[role], rows, size, context)
        name = _forward_name(role, rows, size)
        cells.append(Cell(name, run, {"context": context}, prepare=fill))
    return cells


def floor_seconds(
    costs: Mapping[str, Measurement], rounds: Mapping[Round, int], num_rows: int
) -> float:
    """The floor of a rollout of these rounds."""

    def cost(name: str) -> float:
        return costs[name].median / FORWARDS

    total = sum(cost(_prefill_name(role, num_rows)) for role in ("student", "teacher"))
    for (rows, size), count in rounds.items():
        student = size * cost(_forward_name("student", rows, 1))
        total += count * (student + cost(_forward_name("teacher", rows, size)))
    return total


def _prefill_name(role: str, rows: int) -> str:
    return f"floor: prefill of the {role}, {rows} rows"


def _forward_name(role: str, rows: int, size: int) -> str:
    return f"floor: {role}, {rows} rows of {size} tokens"


def _prefill(model: PreTrainedModel, rows: int, num_tokens: int) -> Callable[[], Facts]:
    ids = torch.ones(rows, num_tokens, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def run() -> Facts:
        for _ in range(FORWARDS):
            cache = DynamicCache(config=model.config)
            model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        return {}

    return run


def _forward(
    model: PreTrainedModel, rows: int, size: int, context: int
) -> tuple[Callable[[], None], Callable[[], Facts]]:
    """Filling a cache, and forwards on it."""
    caches: list[DynamicCache] = []
    ids = torch.ones(rows, context, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def fill() -> None:
        caches[:] = [DynamicCache(config=model.config)]
        model.get_decoder()(input_ids=ids[:, size:], past_key_values=caches[0], use_cache=True)

    @torch.no_grad()
    def run() -> Facts:
        for _ in range(FORWARDS):
            model(input_ids=ids[:, :size], past_key_values=caches[0], use_cache=True)
            caches[0].crop(-size)
        return {}

    return fill, run
