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
    """`Capture` by CUDA graphs that share one memory pool, for as long as the graphs live."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward, inputs: tuple[Tensor, ...]) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back if a capture breaks off; a data loader's pinning
        # thread may go on meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            output = forward(*inputs)
        return graph.replay, output


class GraphedForwards:
    """Runs a forward as it is the first time that a key is seen, captures it the second time.

    A result is overwritten by the next call with its key: use it, or copy it, before. Under autocast,
    the context has to be entered outside, around all of a rollout: the cast weights that a graph reads
    live as long as that.
    """

    def __init__(self, new_capture: Callable[[], Capture], give_up: Callable[[], None]) -> None:
        """
        Args:
            new_capture: for graphs that live and die together.
            give_up: called once, if capturing fails.
        """
        self._new_capture = new_capture
        self._capture: Capture | None = new_capture()
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
        if self._capture is not None:
            self._capture = self._new_capture()  # a pool is not used again once its graphs are gone

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
            # Graphs that exist are left alone until their cache goes: others may still be in use.
            self._capture = None
            self._give_up()
            return False
        self._graphs[key] = (held, replay, output)
        return True
