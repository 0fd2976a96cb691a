"""What is learned at a token: a divergence, a gate on it, put together for a micro-batch.

Legend: N tokens, n of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from axolotl_skd.losses.divergences import Divergence, cross_entropy
from axolotl_skd.losses.fused import Targets, TokenLoss
from axolotl_skd.losses.gates import Gate, gated


@dataclass(frozen=True, slots=True)
class Tokens:
    """The completion tokens of a micro-batch: what a loss may ask of them beside logits.

    Attributes:
        ids: int64 [N].
        uniforms: float64 [N], a keyed random number for the gate.
        accepted: bool [N], where the gate writes its verdicts.
    """

    ids: Tensor
    uniforms: Tensor
    accepted: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a token, V D(p || q), or its cross-entropy where there is no divergence.

    Attributes:
        divergence: D, None for methods that learn the tokens themselves.
        gate: decides about V, None: V = 1.
        reject_weight: V of tokens that the gate rejects.
    """

    divergence: Divergence | None
    gate: Gate | None = None
    reject_weight: float = 0.0

    def recipe(
        self, tokens: Tokens, teacher_logits: Callable[[slice], Tensor] | None
    ) -> tuple[TokenLoss, Targets]:
        """The loss and its targets, for `fused_token_loss`.

        Args:
            tokens: of the micro-batch.
            teacher_logits: of a chunk, [n, V]; None without a divergence.
        """
        if self.divergence is None:
            return cross_entropy, lambda part: (tokens.ids[part],)
        if self.gate is None:
            return self.divergence, lambda part: (teacher_logits(part),)
        return gated(self.divergence, self.gate, self.reject_weight), lambda part: (
            teacher_logits(part),
            tokens.uniforms[part],
            tokens.accepted[part],
        )
