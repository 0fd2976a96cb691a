"""A teacher that waits in the CPU's memory while it is not asked: `distillation.teacher.offload`.

Only its output head stays on the device: the loss applies it after the rollout. Embeddings that are
tied to the head stay with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

WAITING_ROOM = torch.device("cpu")


class Offloaded:
    """Moves a model's decoder, but for what it shares with the head, to and from its device."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: on the device where it is to be used; leaves it at once.
        """
        self._home = model.get_output_embeddings().weight.device
        head = set(model.get_output_embeddings().parameters())
        self._parts: list[nn.Module] = [
            part for part in model.get_decoder().children() if head.isdisjoint(part.parameters())
        ]
        self._move(WAITING_ROOM)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """All of the model on its device."""
        self._move(self._home)
        try:
            yield
        finally:
            self._move(WAITING_ROOM)

    def _move(self, device: torch.device) -> None:
        for part in self._parts:
            part.to(device)
