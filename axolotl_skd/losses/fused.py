"""Token losses straight from hidden states, through `lm_head` in chunks of positions.

Equivalent to `token_loss(head(hidden), *targets).sum()`, but at no time does a matrix of all
positions by the whole vocabulary exist: each chunk's gradient is taken in the forward pass and only
the gradients of the hidden states and of the head remain. Inside a chunk the loss goes block by
block, so that nothing of its size exists but the logits and their gradient.

Legend: N positions, n positions of a chunk, r of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_skd.losses.divergences import ValueAndGradient

# Logits of a chunk, per matrix (student's, teacher's, gradient).
CHUNK_ELEMENTS = 2**25
# Logits that a loss is evaluated on at a time, in float32: all its intermediate results stay in the
# cache of a CPU; a GPU wants work enough for a kernel.
BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**23}

TokenLoss = Callable[..., ValueAndGradient]
"""(student logits [r, V], *targets [r, ...]) of some positions, each by itself"""

Targets = Callable[[slice], tuple[Tensor, ...]]
"""Which positions (n of them) -> what the loss compares their logits with, [n, ...] each"""


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
    targets: Targets,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses, differentiable in `hidden` and the head's parameters.

    Args:
        hidden: student's last hidden states [N, H]; N = 0 gives a zero with a gradient path.
        head: [n, H] -> raw logits [n, V], the differentiable map through `head_module`.
        head_module: whose parameters receive gradients.
        token_loss: losses of some positions, from their logits and their targets.
        targets: of a chunk; asked for once.
        chunk: positions per chunk.

    Returns:
        the sum (0-dim, float32 or better), and the losses [N] without gradient.
    """
    parameters = [p for p in head_module.parameters() if p.requires_grad]
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    return _ChunkedTokenLoss.apply(hidden, head, token_loss, targets, chunk, wanted, *parameters)


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        token_loss: TokenLoss,
        targets: Targets,
        chunk: int,
        wanted: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.zeros(len(hidden), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted else None
        # Sums over chunks are not rounded to half precision until the end.
        grads = [torch.zeros_like(p, dtype=accumulate) for p in parameters] if wanted else []

        def evaluate(part: slice) -> None:
            """All that a chunk needs is gone before the next one begins."""
            chunk_hidden = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(chunk_hidden)
            grad_logits = torch.empty_like(logits) if wanted else None
            _block_by_block(token_loss, logits.detach(), targets(part), losses[part], grad_logits)
            if wanted:
                got = torch.autograd.grad(logits, [chunk_hidden, *parameters], grad_logits)
                for grad, part_grad in zip([grad_hidden[part], *grads], got, strict=True):
                    grad += part_grad

        for start in range(0, len(hidden), chunk):
            evaluate(slice(start, min(start + chunk, len(hidden))))
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
        return (scaled[0], None, None, None, None, None, *scaled[1:])


def _block_by_block(
    token_loss: TokenLoss,
    logits: Tensor,
    targets: tuple[Tensor, ...],
    losses: Tensor,
    grad_logits: Tensor | None,
) -> None:
    """Write a chunk's losses [n] and, where it is wanted, their gradient [n, V] where they belong."""
    elements = BLOCK_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"]
    num_rows = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        loss = token_loss(logits[rows], *(target[rows] for target in targets))
        losses[rows] = loss.values
        if grad_logits is not None:
            grad_logits[rows] = loss.gradient()
