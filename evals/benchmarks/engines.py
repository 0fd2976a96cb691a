"""The package's engine as it is measured, and acceptance of a chosen probability.

A random pair accepts next to nothing. Simulated acceptance computes the real top-K test, whose cost
is real, and then lets a keyed random number decide: proposals at different positions are independent,
and every contender that asks for the same position of the same row gets the same answer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from floor import Round
from models import Pair
from torch import Tensor

from axolotl_skd.rollout.acceptance import AcceptanceRule, accept_top_k
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.graphs import CudaCapture
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.types import SamplingParams


def acceptance(rate: float | None) -> AcceptanceRule:
    """The real top-K test for None, else one that accepts with probability `rate` at its cost."""

    def accept(
        teacher_logits: Tensor, proposed_ids: Tensor, uniforms: Tensor, params: SamplingParams
    ) -> Tensor:
        real = accept_top_k(teacher_logits, proposed_ids, uniforms, params)
        return real if rate is None else uniforms < rate

    return accept


def count_rounds(engine: RolloutEngine) -> Counter[Round]:
    """Rounds by their size, counted from now on: the teacher goes forward once in each."""
    rounds: Counter[Round] = Counter()
    forward = engine.teacher.forward

    def counting(ids: Tensor, *args: Any) -> Tensor:
        rounds[ids.shape[0], ids.shape[1]] += 1
        return forward(ids, *args)

    engine.teacher.forward = counting
    return rounds


def new_engine(
    pair: Pair, accept: AcceptanceRule, rollout_batch_size: int | None = None
) -> RolloutEngine:
    """The engine as `axolotl train` builds it; with graphs where they exist."""
    on_gpu = pair.device.type == "cuda"
    new_capture = CudaCapture if on_gpu else None
    return RolloutEngine(
        CausalLM(pair.student, new_capture=new_capture),
        CausalLM(pair.teacher, new_capture=new_capture),
        accept=accept,
        rollout_batch_size=rollout_batch_size,
        fixed_shapes=on_gpu,
    )
