"""A teacher that waits in the CPU's memory while it is not asked: `distillation.teacher.offload`.

Only its output head stays on the device: the loss applies it after the rollout. Embeddings that are
tied to the head stay with it. Its weights never change, so they are copied to the device, and only
forgotten there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel


class Offloaded:
    """Fetches a frozen model's decoder, but for what it shares with the head, and lets go of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: on the device where it is to be used; leaves it at once.
        """
        self._home = model.get_output_embeddings().weight.device
        head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        decoder = model.get_decoder()
        weights = [*decoder.parameters(), *decoder.buffers()]
        self._waiting = {
            weight: weight.detach().to("cpu", copy=True)
            for weight in weights
            if id(weight) not in head
        }
        self._leave()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """All of the model on its device."""
        for weight, waiting in self._waiting.items():
            weight.data = self._fetched(waiting)
        try:
            yield
        finally:
            self._leave()

    def _fetched(self, waiting: Tensor) -> Tensor:
        return waiting.to(self._home)

    def _leave(self) -> None:
        for weight, waiting in self._waiting.items():
            weight.data = waiting
