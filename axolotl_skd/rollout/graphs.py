"""Forwards of the same shape captured once and replayed: CUDA graphs, if the device can.

Decoding a token is so little work for a GPU that launching its hundreds of kernels takes longer than
running them. A graph launches them all at once, but needs fixed shapes and fixed addresses; so graphs
live and die with the KV cache that they write into, and the batch shrinks in few, large steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

Forward = Callable[..., Tensor]
Replay = Callable[[], None]
Capture = Callable[[Forward, tuple[Tensor, ...]], tuple[Replay, Tensor]]
"""(forward, its inputs) -> (run it again on what the inputs hold by then, where its result appears)"""


class CudaCapture:
    """`Capture` by CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward, inputs: tuple[Tensor, ...]) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = forward(*inputs)
        return graph.replay, output


class GraphedForwards:
    """Runs a forward as it is the first time that a key is seen, captures it the second time.

    A result is overwritten by the next call with its key: use it, or copy it, before.
    """

    def __init__(self, capture: Capture, give_up: Callable[[], None]) -> None:
        """
        Args:
            capture: makes a graph of a forward.
            give_up: called once, if that fails.
        """
        self._capture: Capture | None = capture
        self._give_up = give_up
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[tuple[Tensor, ...], Replay, Tensor]] = {}

    def __call__(self, key: Hashable, forward: Forward, *inputs: Tensor) -> Tensor:
        """`forward(*inputs)`; equal keys promise equal shapes and equal work on the inputs."""
        if self._capture is None:
            return forward(*inputs)
        if key not in self._seen:
            self._seen.add(key)  # and the kernels are chosen and loaded outside a capture
            return forward(*inputs)
        if key not in self._graphs and not self._record(key, forward, inputs):
            return forward(*inputs)
        held, replay, output = self._graphs[key]
        for tensor, value in zip(held, inputs, strict=True):
            tensor.copy_(value)
        replay()
        return output

    def forget(self) -> None:
        """Drop all graphs: the memory that they work on is about to move."""
        self._graphs.clear()
        self._seen.clear()

    def _record(self, key: Hashable, forward: Forward, inputs: tuple[Tensor, ...]) -> bool:
        held = tuple(tensor.clone() for tensor in inputs)
        try:
            replay, output = self._capture(forward, held)
        except Exception as error:  # what cannot be captured differs by model and driver
            LOG.warning(
                "distillation.rollout.cuda_graphs: capturing a forward failed (%s: %s); the rollout "
                "goes on without graphs, with the same tokens.",
                type(error).__name__,
                error,
            )
            self._capture = None
            self._graphs.clear()
            self._give_up()
            return False
        self._graphs[key] = (held, replay, output)
        return True
