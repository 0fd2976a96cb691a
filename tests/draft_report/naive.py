"""Greedy speculative decoding from its definition: no caches, one token at a time."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from axolotl_skd.draft_report.counting import SpeculationCounts
from axolotl_skd.draft_report.decoding import Decoding


@torch.no_grad()
def argmax(lm: PreTrainedModel, ids: list[int]) -> int:
    return int(lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())


def naive_greedy(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    prompt: list[int],
    num_draft: int,
    how: Decoding,
) -> tuple[list[int], SpeculationCounts]:
    """Committed tokens, and counts made as it goes."""
    out: list[int] = []
    proposed = verified = accepted = calls = 0

    def done() -> bool:
        return len(out) == how.max_new_tokens or (bool(out) and out[-1] in how.stop_token_ids)

    while not done():
        draft: list[int] = []
        room = how.max_new_tokens - len(out) - 1
        while len(draft) < min(num_draft, room) and not set(draft) & set(how.stop_token_ids):
            draft.append(argmax(student, [*prompt, *out, *draft]))
        calls, proposed = calls + 1, proposed + len(draft)
        for token in draft:
            verified += 1
            wanted = argmax(teacher, [*prompt, *out])
            out.append(wanted)
            if wanted != token:
                break
            accepted += 1
        else:
            if not done():
                out.append(argmax(teacher, [*prompt, *out]))
    return out, SpeculationCounts(proposed, verified, accepted, calls, len(out))
