"""SKD's Algorithm 1 as it is written down, and as the published code's shape runs it.

Both know one row at a time. `uncached` asks the whole models anew at every step. `cached_rows` keeps
stock transformers caches and crops what was rejected; the teacher's states are then recomputed by a
forward of the finished row, as the loss of the published code does.

They share the keyed random numbers and the sampler with the engine, and nothing else: that their
tokens equal the engine's is asserted by the benchmarks that time them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from models import Pair
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from axolotl_skd.rollout.acceptance import AcceptanceRule
from axolotl_skd.rollout.sampling import Role, keyed_uniform, sample_top_p
from axolotl_skd.rollout.types import Prompts, SamplingParams

NextLogits = Callable[[list[int], int], Tensor]
"""(ids so far, n) -> raw logits that predict the last n of them and one more, [1 + n, V]"""


@torch.no_grad()
def uncached(
    pair: Pair, prompts: Prompts, params: SamplingParams, num_draft: int, accept: AcceptanceRule
) -> list[list[int]]:
    """The completions, no cache anywhere."""

    def logits_of(model: PreTrainedModel) -> NextLogits:
        def logits(ids: list[int], num_last: int) -> Tensor:
            batch = torch.tensor([ids], device=pair.device)
            return model(input_ids=batch, use_cache=False).logits[0, -1 - num_last :]

        return logits

    return _rows(
        prompts,
        params,
        num_draft,
        accept,
        lambda: (logits_of(pair.student), logits_of(pair.teacher)),
    )


@torch.no_grad()
def cached_rows(
    pair: Pair, prompts: Prompts, params: SamplingParams, num_draft: int, accept: AcceptanceRule
) -> list[list[int]]:
    """The completions, row by row with a cache for each model."""
    return _rows(
        prompts,
        params,
        num_draft,
        accept,
        lambda: (CachedModel(pair.student), CachedModel(pair.teacher)),
    )


class CachedModel:
    """Next-token logits of one row; what is cached is the longest prefix shared with the last call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._ids: list[int] = []

    def __call__(self, ids: list[int], num_last: int) -> Tensor:
        shared = 0
        for ours, theirs in zip(self._ids, ids[: len(ids) - num_last - 1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if shared < len(self._ids):
            self._cache.crop(shared - len(self._ids))
        fed = torch.tensor([ids[shared:]], device=self._model.device)
        self._ids = list(ids)
        return self._model(
            input_ids=fed,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 + num_last,
        ).logits[0]


@torch.no_grad()
def recompute_teacher(
    pair: Pair, prompts: Prompts, completions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The teacher's states that predict the completions, by one forward per row: [T_b, H] each."""
    states = []
    for prompt, completion in zip(prompts.ids, completions, strict=True):
        ids = torch.cat([prompt, torch.tensor(completion)])[None].to(pair.device)
        hidden = pair.teacher.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1])
    return states


def _rows(
    prompts: Prompts,
    params: SamplingParams,
    num_draft: int,
    accept: AcceptanceRule,
    new_models: Callable[[], tuple[NextLogits, NextLogits]],
) -> list[list[int]]:
    completions = []
    limits = prompts.max_new_tokens.tolist()
    for ids, stream, limit in zip(prompts.ids, prompts.streams, limits, strict=True):
        student, teacher = new_models()
        completions.append(
            _row(student, teacher, ids.tolist(), stream, limit, params, num_draft, accept)
        )
    return completions


def _row(
    student: NextLogits,
    teacher: NextLogits,
    prompt: list[int],
    stream: Tensor,
    limit: int,
    params: SamplingParams,
    num_draft: int,
    accept: AcceptanceRule,
) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        size = min(num_draft, len(prompt) + limit - len(ids))
        positions = torch.arange(len(ids), len(ids) + size)
        draws = keyed_uniform(stream, positions, Role.STUDENT)
        draft: list[int] = []
        for i in range(size):
            logits = student(ids + draft, 0)
            draft.append(
                int(
                    sample_top_p(
                        logits,
                        params.student_temperature,
                        params.student_top_p,
                        draws[i : i + 1].to(logits.device),
                    )
                )
            )
        logits = teacher(ids + draft[:-1], size - 1)
        accepted = accept(
            logits[None],
            torch.tensor([draft], device=logits.device),
            keyed_uniform(stream, positions, Role.ACCEPT)[None].to(logits.device),
            params,
        )[0].tolist()
        kept = accepted.index(False) if False in accepted else size
        new = draft[:kept]
        if kept < size:
            draw = keyed_uniform(stream, positions[kept : kept + 1], Role.TEACHER)
            replacement = sample_top_p(
                logits[kept : kept + 1],
                params.teacher_temperature,
                params.teacher_top_p,
                draw.to(logits.device),
            )
            new.append(int(replacement))
        for token in new:
            ids.append(token)
            if token in params.stop_token_ids:
                return ids[len(prompt) :]
    return ids[len(prompt) :]
