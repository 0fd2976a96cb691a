"""What is learned at a token: divergence, gate and cross-entropy, put together for a micro-batch.

Legend: N tokens, n of a chunk, V vocabulary; p teacher, q student in formulas only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from axolotl_skd.losses.divergences import (
    Divergence,
    ValueAndGradient,
    cross_entropy,
    scaled,
)
from axolotl_skd.losses.fused import Targets, TokenLoss
from axolotl_skd.losses.gates import Gate, gated


@dataclass(frozen=True, slots=True)
class Tokens:
    """The completion tokens of a micro-batch: what a loss may ask of them beside logits.

    Attributes:
        ids: int64 [N].
        from_data: bool [N], True where they are the data set's own, so ground truth.
        uniforms: float64 [N], a keyed random number for the gate.
        accepted: bool [N], where the gate writes its verdicts.
        weights: [N], of the whole loss of a token; None: all one.
    """

    ids: Tensor
    from_data: Tensor
    uniforms: Tensor
    accepted: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a token: kd_weight V D(p || q) + ce_weight c CE, c = 1 on ground truth.

    Without a divergence it is the cross-entropy of every token, wherever it came from.

    Attributes:
        divergence: D, None for methods that learn the tokens themselves.
        gate: decides about V, None: V = 1.
        reject_weight: V of tokens that the gate rejects.
        kd_weight, ce_weight: of the two terms.
    """

    divergence: Divergence | None
    gate: Gate | None = None
    reject_weight: float = 0.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0

    def recipe(
        self, tokens: Tokens, teacher_logits: Callable[[slice], Tensor] | None
    ) -> tuple[TokenLoss, Targets]:
        """The loss and its targets, for `fused_token_loss`.

        Args:
            tokens: of the micro-batch.
            teacher_logits: of a chunk, [n, V]; None without a divergence.
        """
        loss, columns = self._unweighted(tokens)
        if tokens.weights is not None:
            loss, columns = _weighted(loss), (*columns, tokens.weights)

        def targets(part: slice) -> tuple[Tensor, ...]:
            of_tokens = tuple(column[part] for column in columns)
            return of_tokens if teacher_logits is None else (teacher_logits(part), *of_tokens)

        return loss, targets

    def _unweighted(self, tokens: Tokens) -> tuple[TokenLoss, tuple[Tensor, ...]]:
        """The loss, and what it asks of the tokens behind the teacher's logits."""
        if self.divergence is None:
            return cross_entropy, (tokens.ids,)
        loss, columns = self.divergence, ()
        if self.gate is not None:
            loss = gated(loss, self.gate, self.reject_weight)
            columns = (tokens.uniforms, tokens.accepted)
        if self.ce_weight or self.kd_weight != 1:
            loss = _beside_cross_entropy(loss, self.kd_weight)
            columns = (*columns, tokens.ids, self.ce_weight * tokens.from_data)
        return loss, columns


def _weighted(loss: TokenLoss) -> TokenLoss:
    """A loss times constants: (student logits, *targets, weights)."""

    def weighted(student_logits: Tensor, *targets: Tensor) -> ValueAndGradient:
        *of_loss, weights = targets
        return scaled(loss(student_logits, *of_loss), weights)

    return weighted


def _beside_cross_entropy(distillation: TokenLoss, kd_weight: float) -> TokenLoss:
    """kd_weight times a loss plus weighted cross-entropy: (student logits, *targets, ids, weights)."""

    def loss(student_logits: Tensor, *targets: Tensor) -> ValueAndGradient:
        *of_distillation, token_ids, ce_weights = targets
        kd = distillation(student_logits, *of_distillation)
        ce = scaled(cross_entropy(student_logits, token_ids), ce_weights)
        return ValueAndGradient(
            kd_weight * kd.values + ce.values,
            lambda: kd_weight * kd.gradient() + ce.gradient(),
        )

    return loss
