"""The memory forecast: exact where it can be (weights, caches, kept states), monotone elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from axolotl_skd.held_weights import stored_bytes
from axolotl_skd.memory import (
    GIB,
    Forecast,
    PeakMemory,
    StepShape,
    device_memory,
    forecast,
    kv_bytes,
    weight_bytes,
)
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM, FullLogitsLM
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, SamplingParams, Source
from tests.rollout.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")
SHAPE = StepShape(
    window_rows=6,
    rows_in_flight=4,
    batch_rows=2,
    prompt_tokens=9,
    new_tokens=7,
    row_tokens=16,
    reads_data=False,
    source=Source.INTERLEAVED,
    checkpointing=False,
    activation_bytes=4,
    optimizer="adamw_torch",
)


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLM, CausalLM]:
    student = CausalLM(tiny_model("llama", seed=1))
    teacher = CausalLM(tiny_model("llama", seed=2, hidden_size=48, num_layers=3))
    teacher.model.requires_grad_(False)
    return student, teacher


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_the_real_cache(family: str, dtype: torch.dtype) -> None:
    lm = CausalLM(tiny_model(family, seed=1).to(dtype))
    cache = lm.new_cache(3, 10)
    with torch.no_grad():
        lm.prefill(torch.ones(3, 4, dtype=torch.long), torch.arange(3), cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * 10 * kv_bytes(lm)


def test_kept_states_are_those_of_a_real_rollout(pair: tuple[CausalLM, CausalLM]) -> None:
    prompts = Prompts(
        tuple(torch.ones(9, dtype=torch.long) for _ in range(6)),
        row_streams(0, 0, torch.arange(6)),
        torch.full((6,), 7),
    )
    params = SamplingParams(3, 300, 1.0, 0.9, 1.0, 0.9, ())
    with torch.no_grad():
        rollout = RolloutEngine(*pair).interleave(prompts, params)
    parts = forecast(*pair, SHAPE)
    assert parts.training["teacher states"] == rollout.teacher_hidden.nbytes
    assert parts.rollout["teacher states"] == rollout.teacher_hidden.nbytes


def test_weights_gradients_and_optimizer(pair: tuple[CausalLM, CausalLM]) -> None:
    student, teacher = pair
    size = 4 * sum(p.numel() for p in student.model.parameters())
    parts = forecast(student, teacher, SHAPE).training
    assert weight_bytes(student) == parts["student"] == parts["gradients"] == size
    assert parts["optimizer"] == 2 * size
    assert parts["teacher"] == weight_bytes(teacher)
    sgd = forecast(student, teacher, replace(SHAPE, optimizer="sgd"))
    assert sgd.training["optimizer"] == 0
    assert forecast(student, None, SHAPE).training["teacher"] == 0


def test_a_frozen_student_part_needs_no_gradient() -> None:
    student = CausalLM(tiny_model("llama", seed=1))
    student.model.requires_grad_(False)
    student.model.model.norm.weight.requires_grad_(True)
    parts = forecast(student, None, SHAPE).training
    assert parts["gradients"] == 4 * student.model.model.norm.weight.numel()
    assert parts["head gradient"] == 0


@pytest.mark.parametrize(
    ("change", "phase", "part"),
    [
        ({"rows_in_flight": 8}, "rollout", "KV caches"),
        ({"new_tokens": 70}, "rollout", "KV caches"),
        ({"row_tokens": 70}, "training", "activations"),
        ({"prompt_tokens": 90}, "rollout", "prompts"),
        ({"window_rows": 60}, "training", "teacher states"),
        ({"batch_rows": 20}, "training", "activations"),
        ({"activation_bytes": 8}, "training", "activations"),
    ],
)
def test_more_of_it_needs_more(
    pair: tuple[CausalLM, CausalLM], change: dict[str, int], phase: str, part: str
) -> None:
    before, after = (forecast(*pair, shape) for shape in (SHAPE, replace(SHAPE, **change)))
    assert getattr(after, phase)[part] > getattr(before, phase)[part]


def test_checkpointing_needs_less(pair: tuple[CausalLM, CausalLM]) -> None:
    less = forecast(*pair, replace(SHAPE, checkpointing=True)).training["activations"]
    assert less < forecast(*pair, SHAPE).training["activations"]


def test_without_a_rollout_nothing_is_kept(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(*pair, replace(SHAPE, source=Source.DATASET))
    assert not parts.rollout
    assert parts.training["teacher states"] == 0
    assert parts.phase == "training"


def test_only_models_that_sample_have_caches(pair: tuple[CausalLM, CausalLM]) -> None:
    student, teacher = map(kv_bytes, pair)
    slots = SHAPE.rows_in_flight * (SHAPE.prompt_tokens + SHAPE.new_tokens)
    for source, per_slot in [
        (Source.STUDENT, student),
        (Source.TEACHER, teacher),
        (Source.INTERLEAVED, student + teacher),
    ]:
        parts = forecast(*pair, replace(SHAPE, source=source))
        assert parts.rollout["KV caches"] == slots * per_slot
        kept = source is Source.INTERLEAVED
        assert bool(parts.training["teacher states"]) == kept


def test_full_logits_count(pair: tuple[CausalLM, CausalLM]) -> None:
    full = FullLogitsLM(pair[0].model)
    parts = [forecast(lm, pair[1], SHAPE).training["activations"] for lm in (full, pair[0])]
    rows = SHAPE.batch_rows * SHAPE.row_tokens
    assert parts[0] - parts[1] == 3 * rows * full.state_size * SHAPE.activation_bytes


def test_weights_cast_for_a_rollout_count(pair: tuple[CausalLM, CausalLM]) -> None:
    predicted = forecast(*pair, replace(SHAPE, activation_bytes=2))
    half = predicted.rollout["cast weights"]
    assert predicted.training["cast weights"] == half
    assert half == weight_bytes(pair[0]) // 2
    assert forecast(*pair, SHAPE).rollout["cast weights"] == 0


def test_the_peak_is_the_larger_phase() -> None:
    what = Forecast(
        CPU,
        {"student": 1 * GIB, "KV caches": 3 * GIB},
        {"student": 1 * GIB, "optimizer": GIB // 2},
        {},
    )
    assert (what.phase, what.peak) == ("rollout", 4 * GIB)
    assert str(what) == "predicted peak 4.00 GiB, in the rollout (student 1.00, KV caches 3.00)"
    assert replace(what, rollout={}).phase == "training"
    spread = replace(what, elsewhere={torch.device("cuda:1"): 5 * GIB})
    assert str(spread) == f"{what}; 5.00 GiB on cuda:1"


def test_the_student_as_its_own_teacher_is_counted_once(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(pair[0], CausalLM(pair[0].model), SHAPE)
    assert parts.training["teacher"] == 0
    assert (
        parts.rollout["KV caches"]
        == 2 * forecast(pair[0], None, replace(SHAPE, source=Source.STUDENT)).rollout["KV caches"]
    )


def test_an_offloaded_teacher_leaves_its_head(pair: tuple[CausalLM, CausalLM]) -> None:
    whole, head = weight_bytes(pair[1]), pair[1].head_module.weight.nbytes
    parts = forecast(*pair, SHAPE, offloaded=True)
    assert (parts.rollout["teacher"], parts.training["teacher"]) == (whole, head)
    assert parts.elsewhere == {CPU: whole}, "where it waits"
    mixed = forecast(*pair, replace(SHAPE, reads_data=True), offloaded=True)
    assert mixed.training["teacher"] == whole


def test_a_teacher_that_writes_and_goes(pair: tuple[CausalLM, CausalLM]) -> None:
    parts = forecast(*pair, replace(SHAPE, source=Source.TEACHER), released=True)
    assert parts.rollout["teacher"] == weight_bytes(pair[1])
    slots = SHAPE.rows_in_flight * (SHAPE.prompt_tokens + SHAPE.new_tokens)
    assert parts.rollout["KV caches"] == slots * kv_bytes(pair[1])
    assert parts.training["teacher"] == 0


def test_a_teacher_elsewhere_is_counted_there(pair: tuple[CausalLM, CausalLM]) -> None:
    teacher = CausalLM(tiny_model("llama", seed=2).to("meta"))
    parts = forecast(pair[0], teacher, SHAPE)
    assert parts.training["teacher"] == 0
    slots = SHAPE.rows_in_flight * (SHAPE.prompt_tokens + SHAPE.new_tokens)
    needed = weight_bytes(teacher) + slots * kv_bytes(teacher)
    assert parts.elsewhere == {torch.device("meta"): needed}


def test_packed_weights_in_buffers_count(pair: tuple[CausalLM, CausalLM]) -> None:
    """As kernels of pre-quantised checkpoints keep them."""
    teacher = CausalLM(tiny_model("llama", seed=2))
    plain = forecast(pair[0], teacher, SHAPE).training["teacher"]
    packed = torch.zeros(1000, dtype=torch.uint8)
    teacher.model.model.layers[0].register_buffer("qweight", packed)
    assert forecast(pair[0], teacher, SHAPE).training["teacher"] == plain + 1000
    teacher.model.model.layers[0].register_buffer("scratch", packed, persistent=False)
    assert weight_bytes(teacher) == plain + 1000


def test_float32_weights_under_autocast_keep_float32_states(
    pair: tuple[CausalLM, CausalLM],
) -> None:
    """What a layer reads is of the weights' dtype, and kept, whatever it computes in."""
    shape = replace(SHAPE, activation_bytes=2, checkpointing=True)
    one = replace(shape, batch_rows=1, row_tokens=1)
    layers, hidden = pair[0].config.num_hidden_layers, pair[0].config.hidden_size
    kept = 4 * layers * hidden
    half = CausalLM(tiny_model("llama", seed=1).bfloat16())
    finer, coarser = (forecast(lm, None, one).training["activations"] for lm in (pair[0], half))
    assert finer - coarser == kept // 2 + 2 * 4 * hidden


def test_a_teacher_that_is_asked_while_the_student_trains(
    pair: tuple[CausalLM, CausalLM],
) -> None:
    asked = forecast(*pair, replace(SHAPE, source=Source.DATASET)).training["teacher forward"]
    tokens, config = SHAPE.batch_rows * SHAPE.row_tokens, pair[1].config
    layer = 4 * (12 * config.hidden_size + 4 * config.intermediate_size)
    assert asked == tokens * (layer + 4 * config.hidden_size)
    assert forecast(*pair, SHAPE).training["teacher forward"] == 0, "verification knows it all"


def test_quantised_weights_count_as_they_are_stored() -> None:
    weight = nn.Linear(64, 32, dtype=torch.bfloat16)
    quantize_(weight, Int8WeightOnlyConfig())
    # A byte a number, and a scale and a zero point a row, where bf16 has two bytes a number.
    assert 64 * 32 < stored_bytes(weight.weight) <= 64 * 32 + 32 * 16


def test_this_machine_has_memory() -> None:
    assert GIB < device_memory(CPU) < 2**50
    assert device_memory(torch.device("meta")) is None


def test_the_measured_peak_counts_the_models_and_what_came_after() -> None:
    gauge = PeakMemory(torch.device("cpu"), loaded=GIB)
    assert GIB <= gauge.read() < GIB + 2**20
    block: Tensor = torch.ones(2**29)  # 2 GiB, more than anything before it
    assert gauge.read() > GIB + block.nbytes // 4
