"""The forecast of a rank among several: sums by hand, of models whose sizes are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from axolotl_skd.memory import Forecast, forecast, weight_bytes
from axolotl_skd.memory_of_ranks import Division, on_each_rank
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.types import Source
from axolotl_skd.sharding import Engine
from tests.rollout.tiny import tiny_model
from tests.test_memory import SHAPE

HALF = replace(SHAPE, activation_bytes=2)


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLM, CausalLM]:
    student = CausalLM(tiny_model("llama", seed=1).bfloat16())
    teacher = CausalLM(tiny_model("llama", seed=2, hidden_size=48, num_layers=3).bfloat16())
    teacher.model.requires_grad_(False)
    return student, teacher


def of_rank(pair: tuple[CausalLM, CausalLM], shape=HALF, released=False, **division) -> Forecast:
    division = {"teacher": True, "by_layer": False, "ranks": 4, **division}
    alone = forecast(*pair, shape, released=released)
    return on_each_rank(alone, *pair, shape, Division(**division))


def numbers(lm: CausalLM) -> int:
    return sum(p.numel() for p in lm.model.parameters())


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def test_one_rank_alone(pair: tuple[CausalLM, CausalLM]) -> None:
    assert of_rank(pair, engine=Engine.WHOLE, ranks=1) == forecast(*pair, HALF)


def test_ddp_sends_gradients_from_buckets(pair: tuple[CausalLM, CausalLM]) -> None:
    alone, here = forecast(*pair, HALF), of_rank(pair, engine=Engine.WHOLE)
    assert here.rollout == alone.rollout
    buckets = {"gradient buckets": alone.training["gradients"]}
    assert here.training == {**alone.training, **buckets}


def test_zero_1_divides_what_the_optimizer_holds(pair: tuple[CausalLM, CausalLM]) -> None:
    alone, here = forecast(*pair, HALF), of_rank(pair, engine=Engine.ZERO_1_2)
    # A float32 master and two moments of each number.
    states = {"optimizer": 12 * numbers(pair[0]) // 4}
    assert here.training == {**alone.training, **states}
    assert here.rollout == {**alone.rollout, **states}


def test_masters_of_float32_weights_are_these(pair: tuple[CausalLM, CausalLM]) -> None:
    student = CausalLM(tiny_model("llama", seed=1))
    here = of_rank((student, pair[1]), engine=Engine.ZERO_1_2)
    assert here.training["optimizer"] == 8 * numbers(student) // 4


@pytest.mark.parametrize("engine", [Engine.ZERO_3, Engine.FSDP_2])
def test_divided_models_are_whole_while_they_sample(
    pair: tuple[CausalLM, CausalLM], engine: Engine
) -> None:
    here, (student, teacher) = of_rank(pair, engine=engine), pair
    sizes = weight_bytes(student), weight_bytes(teacher)
    for phase in (here.rollout, here.training):
        assert (phase["student"], phase["teacher"]) == (sizes[0] // 4, sizes[1] // 4)
        assert phase["optimizer"] == 12 * numbers(student) // 4
    assert here.rollout["gathered student"] == sizes[0]
    assert here.rollout["gathered teacher"] == sizes[1]
    layer = bytes_of(student.model.model.layers[0])
    heads = [bytes_of(lm.head_module) for lm in pair]
    if engine is Engine.FSDP_2:  # with all that is outside of the layers
        heads = [bytes_of(lm.model) - sum(map(bytes_of, lm.model.model.layers)) for lm in pair]
    assert here.training["gathered student"] == heads[0] + layer
    assert here.training["gathered teacher"] == heads[1]
    assert here.training["gradients"] == sizes[0] // 4


def test_a_teacher_by_layers_is_never_whole(pair: tuple[CausalLM, CausalLM]) -> None:
    here, inner = of_rank(pair, engine=Engine.ZERO_3, by_layer=True), pair[1].model.model
    layer = bytes_of(inner.layers[0])
    needed = weight_bytes(pair[1]) - 2 * layer  # of three layers one
    assert here.rollout["gathered teacher"] == needed
    assert here.training["gathered teacher"] == bytes_of(pair[1].head_module)


def test_a_teacher_that_is_asked_while_training_is_there(
    pair: tuple[CausalLM, CausalLM],
) -> None:
    shape = replace(HALF, source=Source.DATASET)
    here = of_rank(pair, shape, engine=Engine.FSDP_2)
    assert not here.rollout
    assert here.training["gathered teacher"] == weight_bytes(pair[1])


def test_what_is_gone_is_not_gathered(pair: tuple[CausalLM, CausalLM]) -> None:
    shape = replace(HALF, source=Source.TEACHER)
    here = of_rank(pair, shape, released=True, engine=Engine.ZERO_3)
    assert (here.training["teacher"], here.training["gathered teacher"]) == (0, 0)
    assert here.rollout["gathered teacher"] == weight_bytes(pair[1])


def test_a_quantised_teacher_stays_as_it_is(pair: tuple[CausalLM, CausalLM]) -> None:
    here = of_rank(pair, engine=Engine.ZERO_3, teacher=False)
    assert here.rollout["teacher"] == here.training["teacher"] == weight_bytes(pair[1])
    assert "gathered teacher" not in here.rollout
