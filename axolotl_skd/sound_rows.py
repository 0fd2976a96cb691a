"""Rows of a step of which some have numbers that are not finite: found, named, left out.

Legend: B rows, L padded length, N tokens that are trained on, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_skd.losses.fused import TeacherTargets
from axolotl_skd.rollout.sampling import NonFiniteLogitsError
from axolotl_skd.rollout.types import Prompts, Rollout, SamplingParams

LOG = get_logger(__name__)


def sample_sound_rows(
    sample: Callable[[Prompts, SamplingParams], Rollout],
    prompts: Prompts,
    params: SamplingParams,
    *,
    name: Callable[[int], str],
    skip: bool,
) -> tuple[Rollout | None, Tensor]:
    """Sample; where a row gives NaN or infinity, sample the others anew without it.

    Random numbers are keyed, so nothing else changes for them.

    Args:
        sample: one of the engine's samplers.
        prompts: B rows.
        params: how to sample.
        name: of a row, for people.
        skip: may rows be left out?

    Returns:
        the rollout of the sound rows, None if there is none; and which they are, bool [B].

    Raises:
        NonFiniteLogitsError: a row would have to be left out and may not. Named by `name`.
    """
    sound = torch.ones(len(prompts.ids), dtype=torch.bool)
    while sound.any():
        left = sound.nonzero()[:, 0].tolist()
        try:
            return sample(_select(prompts, left), params), sound
        except NonFiniteLogitsError as error:
            bad = [left[row] for row in error.rows]
            hint = "" if skip else " Such rows can be left out: distillation.on_non_finite: skip."
            names = [name(row) for row in bad]
            named = NonFiniteLogitsError(bad, error.model, names, hint)
            if not skip or not bad:
                raise named from error
            sound[bad] = False
            LOG.warning("skipped: %s", named, main_process_only=False)
    return None, sound


def rows_without_numbers(targets: TeacherTargets, rows: Tensor, chunk: int) -> Tensor:
    """Rows in which the teacher has no distribution over the tokens somewhere.

    Args:
        targets: of N tokens.
        rows: of each token, int64 [N].
        chunk: tokens whose logits [chunk, V] are made at a time.

    Returns:
        their indices, ascending, int64.
    """
    bad = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        # The maximum is NaN where anything is, and infinite where the softmax is undefined. -inf alone
        # is an impossible token.
        bad[part] = ~targets.logits(part).amax(dim=-1).isfinite().to(rows.device)
    return rows[bad].unique()


def _select(prompts: Prompts, rows: Sequence[int]) -> Prompts:
    index = torch.tensor(rows, device=prompts.streams.device)
    return Prompts(
        tuple(prompts.ids[row] for row in rows),
        prompts.streams[index],
        prompts.max_new_tokens[index.to(prompts.max_new_tokens.device)],
    )
