"""The acceptance rate of speculative sampling without drafting: alpha = E sum_v min(p(v), q(v)).

p is the teacher's and q the student's distribution of the next token, both untempered; the mean is over
all positions of texts that the teacher sampled (Leviathan et al., https://arxiv.org/abs/2211.17192,
theorem 3.5 and definition 3.1).

Legend: T completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_skd.rollout.lm import CausalLM

_CHUNK = 64  # positions whose float32 distributions exist at a time


def overlap(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """sum_v min(p(v), q(v)) = 1 - total variation.

    It is the probability that speculative sampling keeps a token drawn from q.

    Args:
        teacher_logits, student_logits: raw [..., V].

    Returns:
        float32 [...], in [0, 1] up to rounding.
    """
    teacher_probs = teacher_logits.float().softmax(-1)
    student_probs = student_logits.float().softmax(-1)
    return torch.minimum(teacher_probs, student_probs).sum(-1)


@torch.no_grad()
def completion_overlaps(
    teacher: CausalLM,
    student: CausalLM,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    chunk: int = _CHUNK,
) -> Tensor:
    """The overlap at every position of one completion, given all tokens before it.

    The stop token is a position like any other; nothing is predicted behind it.

    Args:
        teacher, student: of one vocabulary.
        prompt_ids: at least one token.
        completion_ids: T tokens.
        chunk: positions whose logits [chunk, V] exist at a time.

    Returns:
        float32 [T], on the CPU.
    """
    context = [*prompt_ids, *completion_ids[:-1]]

    def states(model: CausalLM) -> Tensor:
        ids = torch.tensor([context], device=model.device)
        return model.hidden_states(ids)[0, len(prompt_ids) - 1 :]

    pairs = zip(states(teacher).split(chunk), states(student).split(chunk), strict=True)
    overlaps = [
        overlap(teacher.logits(theirs), student.logits(own).to(theirs.device)).cpu()
        for theirs, own in pairs
    ]
    return torch.cat(overlaps)
