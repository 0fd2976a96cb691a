"""Which of the student's proposals the teacher keeps.

Legend: R rows, G draft tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from axolotl_skd.rollout.sampling import top_k_accept_mask
from axolotl_skd.rollout.types import SamplingParams


class AcceptanceRule(Protocol):
    def __call__(
        self, teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
    ) -> Tensor:
        """Would each proposal be kept, were all before it kept?

        Args:
            teacher_logits: raw [R, G, V].
            proposed_ids: int64 [R, G].
            uniforms: float64 [R, G] in [0, 1), keyed by position, for rules that draw.
            params: of the rollout.

        Returns:
            bool [R, G]
        """


def accept_top_k(
    teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
) -> Tensor:
    """SKD's own rule: among the teacher's `teacher_top_k` (paper, Algorithm 1)."""
    return top_k_accept_mask(teacher_logits, proposed_ids, params.teacher_top_k)
