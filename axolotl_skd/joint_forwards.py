"""Forwards that all ranks make together, however many each of them needs.

Where a forward gathers weights from the other ranks, nobody can make one alone. A rank that needs no
more of them takes part in those of the others, with a token that nobody asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def joint_forwards(
    decoder: nn.Module, device: torch.device, on_any_rank: Callable[[bool], bool]
) -> Iterator[None]:
    """Inside, every call of the decoder is one of all ranks; the end waits until none makes another.

    Args:
        decoder: of a language model.
        device: of its inputs.
        on_any_rank: is it so on at least one rank? Asked by all of them: before each forward, and
            after the last one.
    """

    def meet(*_: object) -> None:
        on_any_rank(True)

    # Before all that the decoder's own hooks do.
    hook = decoder.register_forward_pre_hook(meet, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    # Not after an error: then this rank ends, and its launcher the others.
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        while on_any_rank(False):
            decoder(input_ids=token, use_cache=False)
