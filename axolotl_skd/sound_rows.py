"""Rollouts of rows of which some may give logits that nothing can be sampled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_skd.rollout.sampling import NonFiniteLogitsError
from axolotl_skd.rollout.types import Prompts, Rollout, SamplingParams

LOG = get_logger(__name__)


def sample_sound_rows(
    sample: Callable[[Prompts, SamplingParams], Rollout],
    prompts: Prompts,
    params: SamplingParams,
    *,
    samples: Sequence[int],
    most_skipped: int,
) -> tuple[Rollout | None, Tensor]:
    """Sample; where a row gives NaN or infinity, sample the others anew without it.

    Random numbers are keyed, so nothing else changes for them.

    Args:
        sample: one of the engine's samplers.
        prompts: B rows.
        params: how to sample.
        samples: B, what the rows are known by.
        most_skipped: rows that may be left out.

    Returns:
        the rollout of the sound rows, None if there is none; and which they are, bool [B].

    Raises:
        NonFiniteLogitsError: more rows would have to be left out. Names them by `samples`.
    """
    sound = torch.ones(len(prompts.ids), dtype=torch.bool)
    while sound.any():
        left = sound.nonzero()[:, 0].tolist()
        try:
            return sample(_select(prompts, left), params), sound
        except NonFiniteLogitsError as error:
            bad = [left[row] for row in error.rows]
            named = NonFiniteLogitsError([samples[row] for row in bad], whose="sample(s)")
            sound[bad] = False
            if not bad or int((~sound).sum()) > most_skipped:
                raise named from error
            LOG.warning("skipped: %s", named, main_process_only=False)
    return None, sound


def _select(prompts: Prompts, rows: Sequence[int]) -> Prompts:
    index = torch.tensor(rows, device=prompts.streams.device)
    return Prompts(
        tuple(prompts.ids[row] for row in rows),
        prompts.streams[index],
        prompts.max_new_tokens[index.to(prompts.max_new_tokens.device)],
    )
