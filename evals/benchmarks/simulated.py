"""Acceptance of a chosen probability, so that speed can be measured over the range of it.

A random pair accepts next to nothing. Simulated acceptance computes the real top-K test, whose cost
is real, and then lets a keyed random number decide: proposals at different positions are independent,
and every contender that asks for the same position of the same row gets the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

import axolotl_skd.rollout.engine as engine
from axolotl_skd.rollout.sampling import Role, keyed_uniform, top_k_accept_mask
from axolotl_skd.rollout.types import SamplingParams

Accept = Callable[[Tensor, Tensor, Tensor, SamplingParams], Tensor]
"""(teacher logits [R, G, V], proposals [R, G], uniforms [R, G], params) -> accepted, bool [R, G]"""

ACCEPT = 2  # to become Role.ACCEPT


def acceptance(rate: float | None) -> Accept:
    """The real top-K test for None, else one that accepts with probability `rate` at its cost."""

    def accept(
        logits: Tensor, proposals: Tensor, uniforms: Tensor, params: SamplingParams
    ) -> Tensor:
        real = top_k_accept_mask(logits, proposals, params.teacher_top_k)
        return real if rate is None else uniforms.to(real.device) < rate

    return accept


def accept_uniforms(streams: Tensor, positions: Tensor) -> Tensor:
    """The numbers that decide: float64 of the broadcast shape."""
    return keyed_uniform(streams, positions, ACCEPT)


@contextmanager
def simulating(accept: Accept, params: SamplingParams) -> Iterator[None]:
    """Temporary, until the engine takes `accept=`."""
    rows_type, real_uniforms, real_mask = (
        engine._Rows,
        engine._Rows.uniforms,
        engine.top_k_accept_mask,
    )
    latest = []

    def uniforms(self, num_tokens, role):
        if role is Role.TEACHER:
            latest[:] = [real_uniforms(self, num_tokens, ACCEPT)]
        return real_uniforms(self, num_tokens, role)

    rows_type.uniforms = uniforms
    engine.top_k_accept_mask = lambda logits, ids, _k: accept(logits, ids, latest[0], params)
    try:
        yield
    finally:
        rows_type.uniforms = real_uniforms
        engine.top_k_accept_mask = real_mask


def new_engine(pair, accept: Accept, rows_in_flight: int | None):
    """Temporary, until the engine takes all of this."""
    from axolotl_skd.rollout.lm import CausalLM

    return engine.RolloutEngine(CausalLM(pair.student), CausalLM(pair.teacher))


HAS_AUTO = HAS_REFILL = False  # temporary
