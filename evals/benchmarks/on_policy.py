"""Plain on-policy distillation as one writes it with transformers alone: `generate`, then the teacher.

One left-padded batch; every row runs until the longest one is done.
"""

from __future__ import annotations

import torch
from models import Pair, left_padded
from torch import Tensor
from transformers import GenerationConfig

from axolotl_skd.rollout.types import Prompts, SamplingParams


@torch.no_grad()
def generate(
    pair: Pair, prompts: Prompts, params: SamplingParams
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The student's samples.

    Returns:
        ids and attention mask int64 [B, P + T], completions cut to their own limits and stop tokens.
    """
    ids, mask = left_padded(prompts.ids, pair.device)
    longest = int(prompts.max_new_tokens.max())
    config = GenerationConfig(
        do_sample=True,
        temperature=params.student_temperature,
        top_p=params.student_top_p,
        top_k=0,
        max_new_tokens=longest,
        eos_token_id=list(params.stop_token_ids) or None,
        pad_token_id=0,
    )
    output = pair.student.generate(ids, attention_mask=mask, generation_config=config)
    made = output[:, ids.shape[1] :]
    completions = [
        _cut(row.tolist(), limit, params.stop_token_ids)
        for row, limit in zip(made, prompts.max_new_tokens.tolist(), strict=True)
    ]
    return output, torch.cat([mask, torch.ones_like(made)], dim=1), completions


@torch.no_grad()
def teacher_states(pair: Pair, ids: Tensor, mask: Tensor) -> Tensor:
    """The teacher's hidden states of whole rows [B, L, H], by one forward."""
    return pair.teacher.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    ).last_hidden_state


def positions_of(mask: Tensor) -> Tensor:
    """Positions of left-padded rows, int64 [B, L]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _cut(tokens: list[int], limit: int, stop_ids: tuple[int, ...]) -> list[int]:
    tokens = tokens[:limit]
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
