"""Weights that are spread over ranks, made whole where they are needed: ZeRO-3 and FSDP2.

Ranks roll out rows of unequal length, so no forward of a rollout may wait for another rank: a model is
gathered once for a whole window, and in between its forwards are as free of communication as on one
rank. What is collective are the contexts of `AtHand`: every rank must enter them equally often.

With DDP and ZeRO-1/2 every rank has all weights, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.models.utils import add_hooks, prepare_deepspeed, prepare_fsdp, remove_hooks

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class AtHand:
    """Contexts without which weights may be elsewhere: on other ranks, or in the CPU's memory.

    Attributes:
        student: for rollouts of the student, by every rank on its own.
        teacher: for any forward of the teacher's decoder, likewise.
        heads: for both output heads in the loss, and for its gradient. After the student's forward.
        on_any_rank: is something so on at least one of the ranks that have to meet in these contexts?
    """

    student: Context = nullcontext
    teacher: Context = nullcontext
    heads: Context = nullcontext
    on_any_rank: Callable[[bool], bool] = bool


class Engine(Enum):
    """How weights, gradients and optimizer states lie on the ranks."""

    WHOLE = "plain data parallelism"
    ZERO_1_2 = "DeepSpeed ZeRO-1/2"
    ZERO_3 = "DeepSpeed ZeRO-3"
    FSDP_2 = "FSDP2"

    @property
    def shards_weights(self) -> bool:
        """Does a rank have only a part of the weights?"""
        return self in (Engine.ZERO_3, Engine.FSDP_2)


def running_engine(accelerator: Accelerator) -> Engine:
    """The engine that accelerate has started."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return Engine.ZERO_3 if plugin.zero_stage == 3 else Engine.ZERO_1_2
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return Engine.WHOLE if fsdp is None else Engine.FSDP_2


def shard_teacher(teacher: PreTrainedModel, accelerator: Accelerator, engine: Engine) -> None:
    """Spread a teacher over the ranks as the student will be, in place."""
    if engine is Engine.ZERO_3:
        # Its hooks would gather layer by layer, in every forward, on all ranks together.
        remove_hooks(prepare_deepspeed(teacher, accelerator))
    elif engine is Engine.FSDP_2:
        prepare_fsdp(teacher, accelerator)


def at_hand(
    accelerator: Accelerator,
    engine: Engine,
    wrapped: Callable[[], nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
) -> AtHand:
    """The contexts that an engine needs.

    Args:
        accelerator, engine: what spreads the weights.
        wrapped: the student as the trainer calls it at the moment.
        student: the causal LM inside.
        teacher: as `shard_teacher` left it.
    """
    on_any_rank = _any_rank(accelerator)
    if engine is Engine.ZERO_3:
        return zero3_at_hand(wrapped, student, teacher, on_any_rank)
    if engine is Engine.FSDP_2:
        reshard = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        return fsdp2_at_hand(wrapped, student, teacher, on_any_rank, reshard)
    return AtHand()


def _any_rank(accelerator: Accelerator) -> Callable[[bool], bool]:
    def on_any_rank(here: bool) -> bool:
        flag = torch.tensor(float(here), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)

    return on_any_rank


def zero3_at_hand(
    wrapped: Callable[[], nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    on_any_rank: Callable[[bool], bool],
) -> AtHand:
    """DeepSpeed's gathering, with the hooks of the student's engine off during rollouts.

    The head's gradient reaches DeepSpeed through the hook on its parameter, whole, as from a layer.
    """
    import deepspeed  # an extra of Axolotl's

    gathered = deepspeed.zero.GatheredParameters

    @contextmanager
    def student_at_hand() -> Iterator[None]:
        engine = wrapped()  # before training begins the model itself, which has no hooks
        with gathered(list(student.parameters())):
            remove_hooks(engine)
            try:
                yield
            finally:
                add_hooks(engine)

    def parameters(model: PreTrainedModel | None) -> list[nn.Parameter]:
        return [] if model is None else list(model.parameters())

    def head(model: PreTrainedModel | None) -> list[nn.Parameter]:
        return [] if model is None else list(model.get_output_embeddings().parameters())

    return AtHand(
        student=student_at_hand,
        teacher=lambda: gathered(parameters(teacher)),
        heads=lambda: gathered(head(student) + head(teacher)),
        on_any_rank=on_any_rank,
    )


def fsdp2_at_hand(
    wrapped: Callable[[], nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    on_any_rank: Callable[[bool], bool],
    reshard_after_forward: bool,
) -> AtHand:
    """FSDP2's unsharding, group by group, with no resharding between the forwards of a rollout.

    Args:
        wrapped, student, teacher, on_any_rank: as in `at_hand`.
        reshard_after_forward: what the student does in training, and is set back to.
    """

    @contextmanager
    def student_at_hand() -> Iterator[None]:
        groups = _groups(wrapped())
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
        try:
            yield
        finally:
            for group in groups:
                group.reshard()
                group.set_reshard_after_forward(reshard_after_forward, recurse=False)

    @contextmanager
    def teacher_at_hand() -> Iterator[None]:
        groups = [] if teacher is None else _groups(teacher)
        for group in groups:
            group.unshard()
        try:
            yield
        finally:
            for group in groups:
                group.reshard()

    @contextmanager
    def heads_at_hand() -> Iterator[None]:
        own = _group_of(student.get_output_embeddings(), wrapped())
        if own is not None:
            own.unshard()
        with teacher_at_hand() if teacher is not None else nullcontext():
            yield
        # With gradients it stays until the backward pass, which reshards.
        if own is not None and not torch.is_grad_enabled():
            own.reshard()

    return AtHand(student_at_hand, teacher_at_hand, heads_at_hand, on_any_rank)


def _groups(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _group_of(part: nn.Module, model: nn.Module) -> FSDPModule | None:
    """The innermost group with this part of a model in it."""
    groups = [group for group in _groups(model) if part in set(group.modules())]
    return groups[-1] if groups else None
