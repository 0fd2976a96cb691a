"""Weights that are spread over ranks, made whole where they are needed: ZeRO-3 and FSDP2.

Ranks roll out rows of unequal length, so no forward of a rollout may wait for another rank: a model is
gathered once for a whole window, and in between its forwards are as free of communication as on one
rank. A teacher that fits nowhere whole is gathered layer by layer instead, in forwards that all ranks
make together (`joint_forwards.py`). What is collective are the contexts of `AtHand`: every rank must
enter them equally often.

With DDP and ZeRO-1/2 every rank has all weights, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from trl.models.utils import add_hooks, prepare_deepspeed, remove_hooks

from axolotl_skd.joint_forwards import joint_forwards

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class AtHand:
    """Contexts without which weights may be elsewhere: on other ranks, or in the CPU's memory.

    Attributes:
        student: for rollouts of the student, by every rank on its own.
        teacher: for any forward of the teacher's decoder, likewise, if inside `asking`.
        asking: inside `teacher`, around as many of its forwards as this rank needs and nothing else
            that is collective. Without it all ranks must make the same number.
        heads: for both output heads in the loss, after the student's forward.
        micro_batch: around a forward and its backward pass, for which parts of `heads` stay.
        on_any_rank: is something so on at least one of the ranks that have to meet in these contexts?
        whole: one weight in one piece, to be asked for by all ranks.
    """

    student: Context = nullcontext
    teacher: Context = nullcontext
    asking: Context = nullcontext
    heads: Context = nullcontext
    micro_batch: Context = nullcontext
    on_any_rank: Callable[[bool], bool] = bool
    whole: Callable[[nn.Parameter], AbstractContextManager[torch.Tensor]] = nullcontext


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


@contextmanager
def loaded_whole(args: TrainingArguments, engine: Engine) -> Iterator[None]:
    """Under ZeRO-3 transformers spreads what it loads, or refuses to say where: not so inside."""
    if engine is not Engine.ZERO_3:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def spread_teacher(teacher: PreTrainedModel, accelerator: Accelerator, engine: Engine) -> None:
    """Spread a teacher over the ranks as the student will be, in place."""
    if engine is Engine.ZERO_3:
        # Its hooks would gather layer by layer, in every forward, on all ranks together.
        remove_hooks(prepare_deepspeed(teacher, accelerator))
    elif engine is Engine.FSDP_2:
        mesh = getattr(accelerator, "torch_device_mesh", None)
        if mesh is not None:
            mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        spread_fsdp2(teacher, mesh)


def spread_fsdp2(model: PreTrainedModel, mesh: DeviceMesh | None = None) -> None:
    """Layer by layer, so that the loss can gather the head without them; in the model's own dtype.

    TRL's `prepare_fsdp` makes one group of all and casts it to the student's precision.

    Args:
        model: in place.
        mesh: of the ranks, default all.
    """
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """What transformers would not split over devices."""
    names = set(model._no_split_modules or ())

    def is_layer(module: nn.Module) -> bool:  # also below the class that FSDP2 puts above its own
        return not names.isdisjoint(base.__name__ for base in type(module).__mro__)

    return [module for module in model.modules() if is_layer(module)]


def at_hand(
    accelerator: Accelerator,
    engine: Engine,
    wrapped: Callable[[], nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    on_any_rank: Callable[[bool], bool],
    by_layer: bool,
) -> AtHand:
    """The contexts that an engine needs.

    Args:
        accelerator, engine: what spreads the weights.
        wrapped: the student as the trainer calls it at the moment.
        student: the causal LM inside.
        teacher: as `spread_teacher` left it.
        on_any_rank: as in `AtHand`.
        by_layer: is the teacher never whole, but for what is outside of its layers?
    """
    if engine is Engine.ZERO_3:
        return zero3_at_hand(wrapped, student, teacher, on_any_rank, by_layer)
    if engine is Engine.FSDP_2:
        reshard = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        return fsdp2_at_hand(wrapped, student, teacher, on_any_rank, by_layer, reshard)
    return AtHand()


def _asking(
    teacher: PreTrainedModel | None, on_any_rank: Callable[[bool], bool], by_layer: bool
) -> Context:
    """`AtHand.asking`: only forwards that gather have to be made together."""
    if teacher is None or not by_layer:
        return nullcontext
    return partial(joint_forwards, teacher.get_decoder(), _device(teacher), on_any_rank)


def zero3_at_hand(
    wrapped: Callable[[], nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    on_any_rank: Callable[[bool], bool],
    by_layer: bool,
) -> AtHand:
    """DeepSpeed's gathering, with the hooks of the student's engine off during rollouts.

    Args:
        wrapped, student, teacher, on_any_rank, by_layer: as in `at_hand`.
    """
    import deepspeed  # an extra of Axolotl's

    backward = ExitStack()

    @contextmanager
    def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """One by one: of several at once deepspeed 0.18.9 awaits only the last that it began.

        With gloo another may end after that, and some weights be garbage until then.
        """
        with ExitStack() as stack:
            for parameter in parameters:
                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
            yield

    @contextmanager
    def teacher_at_hand() -> Iterator[None]:
        if teacher is None:
            yield
            return
        layers = layers_of(teacher) if by_layer else []
        inside = {id(p) for layer in layers for p in layer.parameters()}
        with gathered(p for p in teacher.parameters() if id(p) not in inside), ExitStack() as hooks:
            for layer in layers:
                for hook in _around_forwards(layer, partial(gathered, list(layer.parameters()))):
                    hooks.callback(hook.remove)
            yield

    @contextmanager
    def whole(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        with gathered([] if parameter.numel() else [parameter]):  # which would part it at its end
            yield parameter

    @contextmanager
    def student_at_hand() -> Iterator[None]:
        engine = wrapped()  # before training begins the model itself, which has no hooks
        with gathered(student.parameters()):
            remove_hooks(engine)
            try:
                yield
            finally:
                add_hooks(engine)

    @contextmanager
    def heads_at_hand() -> Iterator[None]:
        with ExitStack() as loss:
            # A gradient can only be added to a whole parameter; from there DeepSpeed's hook takes it.
            until = backward if torch.is_grad_enabled() else loss
            until.enter_context(gathered(_head_parameters(student)))
            loss.enter_context(gathered(_head_parameters(teacher)))
            yield

    @contextmanager
    def micro_batch() -> Iterator[None]:
        with backward:
            yield

    return AtHand(
        student=student_at_hand,
        teacher=teacher_at_hand,
        asking=_asking(teacher, on_any_rank, by_layer),
        heads=heads_at_hand,
        micro_batch=micro_batch,
        on_any_rank=on_any_rank,
        whole=whole,
    )


def _around_forwards(module: nn.Module, context: Context) -> list[RemovableHandle]:
    """Hooks that enter a context before every forward of a module and leave it after."""
    entered = ExitStack()

    def enter(*_: object) -> None:
        entered.enter_context(context())

    def leave(*_: object) -> None:
        entered.close()

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def _head_parameters(model: PreTrainedModel | None) -> list[nn.Parameter]:
    return [] if model is None else list(model.get_output_embeddings().parameters())


def fsdp2_at_hand(
    wrapped: Callable[[], nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    on_any_rank: Callable[[bool], bool],
    by_layer: bool,
    reshard_after_forward: bool,
) -> AtHand:
    """FSDP2's unsharding, with no resharding between the forwards of a rollout.

    Args:
        wrapped, student, teacher, on_any_rank, by_layer: as in `at_hand`.
        reshard_after_forward: what the student does in training, and is set back to.
    """

    @contextmanager
    def heads_at_hand() -> Iterator[None]:
        own = _group_of(student.get_output_embeddings(), wrapped())
        other = None if teacher is None else _group_of(teacher.get_output_embeddings(), teacher)
        passing = [group for group in (own, other) if group is not None]
        for group in passing:
            group.unshard()
        if own is not None and torch.is_grad_enabled():
            passing.remove(own)  # it stays until the backward pass, which reshards
        try:
            yield
        finally:
            for group in passing:
                group.reshard()

    def teacher_at_hand() -> AbstractContextManager[None]:
        if teacher is None:
            return nullcontext()
        # The root's group is what is outside of the layers.
        return _gathered(teacher, [teacher] if by_layer else _groups(teacher), True)

    def whole(parameter: nn.Parameter) -> AbstractContextManager[torch.Tensor]:
        is_spread = isinstance(parameter, DTensor)
        return nullcontext(parameter.full_tensor() if is_spread else parameter)

    return AtHand(
        student=lambda: _gathered(wrapped(), _groups(wrapped()), reshard_after_forward),
        teacher=teacher_at_hand,
        asking=_asking(teacher, on_any_rank, by_layer),
        heads=heads_at_hand,
        on_any_rank=on_any_rank,
        whole=whole,
    )


@contextmanager
def _gathered(
    model: nn.Module, groups: Sequence[FSDPModule], reshard_after_forward: bool
) -> Iterator[None]:
    """Some groups of a model whole; afterwards they do after a forward what they are told to."""
    if groups:
        for group in groups:
            group.set_reshard_after_forward(False, recurse=False)
        # A forward of one token gathers these groups and leaves them so. `unshard` alone would not do:
        # FSDP2 takes for its root what is called first, and rollouts call the decoder.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=_device(model)))
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(reshard_after_forward, recurse=False)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _groups(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _group_of(part: nn.Module, model: nn.Module) -> FSDPModule | None:
    """The innermost group with this part of a model in it."""
    groups = [group for group in _groups(model) if part in set(group.modules())]
    return groups[-1] if groups else None
