"""The memory forecast of a rank among several: what an engine divides, and what it gathers.

    DDP       as alone, and the gradients once more, in the buckets that are sent
    ZeRO-1/2  the optimizer's states divided (the gradients counted whole: stage 1 keeps them so)
    ZeRO-3    weights, gradients and the optimizer's states divided; whole models while they sample,
    FSDP2     the head and a layer of the student while it trains

Engines that divide keep float32 masters beside 16-bit weights, and count them to the optimizer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from axolotl_skd.held_weights import held_bytes
from axolotl_skd.memory import Forecast, StepShape, optimizer_bytes, weight_bytes
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.types import Source
from axolotl_skd.sharding import Engine, layers_of


@dataclass(frozen=True, slots=True)
class Division:
    """What ranks divide among them.

    Attributes:
        engine: which does.
        ranks: how many there are.
        teacher: would a teacher be divided too? Quantised ones are not.
        by_layer: is it gathered layer by layer?
    """

    engine: Engine
    ranks: int
    teacher: bool
    by_layer: bool


def on_each_rank(
    predicted: Forecast,
    student: CausalLM,
    teacher: CausalLM | None,
    shape: StepShape,
    division: Division,
) -> Forecast:
    """What becomes of a forecast for one rank alone.

    Args:
        predicted: that.
        student, teacher, shape: it was made of.
        division: by which engine, over how many ranks.
    """
    if division.ranks == 1 and not division.engine.shards_weights:
        return predicted
    if division.engine is Engine.WHOLE:
        buckets = {"gradient buckets": predicted.training["gradients"]}
        return replace(predicted, training={**predicted.training, **buckets})
    trainable = [p for p in student.model.parameters() if p.requires_grad]
    shared = {
        "optimizer": sum(optimizer_bytes(shape.optimizer, p, masters=True) for p in trainable)
        // division.ranks
    }
    if not division.engine.shards_weights:
        return _with(predicted, shared, shared)

    whole = predicted.training["student"]
    shared |= {"student": whole // division.ranks}
    rollout = {**shared, "gathered student": whole}
    training = {
        **shared,
        "gathered student": _for_loss(student, division.engine) + _largest_layer(student),
        "gradients": predicted.training["gradients"] // division.ranks,
    }
    if teacher is not None and division.teacher:
        asked = weight_bytes(teacher)
        part = asked // division.ranks
        if division.by_layer:
            asked = _outside_of_layers(teacher) + _largest_layer(teacher)
        known = shape.source is Source.INTERLEAVED and not shape.reads_data
        rollout |= {"teacher": part, "gathered teacher": asked}
        training |= {
            "teacher": part,
            "gathered teacher": _for_loss(teacher, division.engine) if known else asked,
        }
        if predicted.training["teacher"] == 0:  # it is gone by then
            training |= {"teacher": 0, "gathered teacher": 0}
    return _with(predicted, rollout, training)


def _with(predicted: Forecast, rollout: Mapping[str, int], training: Mapping[str, int]) -> Forecast:
    """Other parts; where there is no rollout there is still none."""
    return replace(
        predicted,
        rollout=predicted.rollout and {**predicted.rollout, **rollout},
        training={**predicted.training, **training},
    )


def _for_loss(lm: CausalLM, engine: Engine) -> int:
    """The head; FSDP2 gathers all of its group, which is what is outside of the layers."""
    return _outside_of_layers(lm) if engine is Engine.FSDP_2 else held_bytes(lm.head_module)


def _layer_sizes(lm: CausalLM) -> list[int]:
    return [held_bytes(layer) for layer in layers_of(lm.model)]


def _largest_layer(lm: CausalLM) -> int:
    return max(_layer_sizes(lm), default=0)


def _outside_of_layers(lm: CausalLM) -> int:
    return weight_bytes(lm) - sum(_layer_sizes(lm))
