"""Token losses straight from hidden states, through `lm_head` in chunks of positions.

Equivalent to `token_loss(head(hidden)).sum()`, but at no time does a matrix of all
positions by the whole vocabulary exist: each chunk's gradient is taken in the forward pass and only
the gradients of the hidden states and of the head remain.

Legend: N positions, n positions of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Logits that exist at one time, per matrix (student's, teacher's, gradient): 2^25 floats = 128 MiB.
CHUNK_ELEMENTS = 2**25

TokenLoss = Callable[[Tensor, slice], Tensor]
"""(student logits [n, V] of a chunk, which positions) -> losses [n]"""


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The one form in which a loss gets the teacher: hidden states and the head to apply to them.

    Attributes:
        hidden: [N, H_teacher], the states that predict the N tokens.
        head: [n, H_teacher] -> raw logits [n, V].
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def logits(self, positions: slice) -> Tensor:
        """Raw teacher logits [n, V] of some positions."""
        return self.head(self.hidden[positions])


def chunk_size(vocab_size: int) -> int:
    """Positions per chunk for this vocabulary."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


def fused_token_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    head_module: nn.Module,
    token_loss: TokenLoss,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses, differentiable in `hidden` and the head's parameters.

    Args:
        hidden: student's last hidden states [N, H]; N = 0 gives a zero with a gradient path.
        head: [n, H] -> raw logits [n, V], the differentiable map through `head_module`.
        head_module: whose parameters receive gradients.
        token_loss: losses of a chunk.
        chunk: positions per chunk.

    Returns:
        the sum (0-dim, float32 or better), and the losses [N] without gradient.
    """
    wanted = torch.is_grad_enabled()
    parameters = [p for p in head_module.parameters() if p.requires_grad]
    return _ChunkedTokenLoss.apply(hidden, head, token_loss, chunk, wanted, *parameters)


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        token_loss: TokenLoss,
        chunk: int,
        wanted: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.zeros(len(hidden), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        # Sums over chunks are not rounded to half precision until the end.
        grads = [torch.zeros_like(p, dtype=accumulate) for p in parameters] if wanted else []
        for start in range(0, len(hidden), chunk):
            part = slice(start, min(start + chunk, len(hidden)))
            with torch.set_grad_enabled(wanted):
                chunk_hidden = hidden[part].detach().requires_grad_(wanted)
                chunk_losses = token_loss(head(chunk_hidden), part)
                chunk_total = chunk_losses.sum()
            losses[part] = chunk_losses.detach()
            if wanted:
                got = torch.autograd.grad(chunk_total, [chunk_hidden, *parameters])
                grad_hidden[part] = got[0]
                for grad, part_grad in zip(grads, got[1:], strict=True):
                    grad += part_grad
        if wanted:
            ctx.save_for_backward(grad_hidden, *grads)
            ctx.dtypes = [hidden.dtype, *(p.dtype for p in parameters)]
        total = losses.sum()
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_losses: Tensor) -> tuple[Any, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        # Scaled in the sum's precision first: half precision would round, or overflow on, the factor.
        scaled = [
            (grad.to(grad_total.dtype) * grad_total).to(dtype)
            for grad, dtype in zip([grad_hidden, *grads], ctx.dtypes, strict=True)
        ]
        return (scaled[0], None, None, None, None, *scaled[1:])
