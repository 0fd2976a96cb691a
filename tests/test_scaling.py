"""Scaling on paper: formulas by hand, and facts that do not come from them.

Those facts are the sizes of real models, the bytes of a really quantised one, and the project's own
memory forecast, made from modules instead of formulas.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from axolotl_skd.config import TeacherConfig
from axolotl_skd.memory import StepShape, forecast, kv_bytes
from axolotl_skd.memory_of_ranks import Division, on_each_rank
from axolotl_skd.rollout.attention import default_attention
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.types import Source
from axolotl_skd.sharding import Engine
from axolotl_skd.teacher import load_teacher
from tests.helpers import save_model
from tests.rollout.tiny import tiny_model

ROOT = Path(__file__).parents[1]


def sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, size: int) -> dict:
    """Keywords of a configuration."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
    }


# Numbers of weights: those that the published checkpoints count.
MODELS: dict[str, tuple[int, PretrainedConfig]] = {
    "Qwen2.5 0.5B": (
        494_032_768,
        Qwen2Config(
            vocab_size=151_936, tie_word_embeddings=True, **sizes(896, 4864, 24, 14, 2, 64)
        ),
    ),
    "7B": (
        7_615_616_512,
        Qwen2Config(vocab_size=152_064, **sizes(3584, 18_944, 28, 28, 4, 128)),
    ),
    "Gemma-2 2B": (
        2_614_341_888,
        Gemma2Config(vocab_size=256_000, **sizes(2304, 9216, 26, 8, 4, 256)),
    ),
    "27B": (
        27_227_128_320,
        Gemma2Config(vocab_size=256_000, **sizes(4608, 36_864, 46, 32, 16, 128)),
    ),
    "Llama-3.1 8B": (
        8_030_261_248,
        LlamaConfig(vocab_size=128_256, **sizes(4096, 14_336, 32, 32, 8, 128)),
    ),
    "70B": (
        70_553_706_496,
        LlamaConfig(vocab_size=128_256, **sizes(8192, 28_672, 80, 64, 8, 128)),
    ),
}


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "evals" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def without_storage(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A named model on the meta device."""
    config = MODELS[name][1]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=default_attention(config)
        )


def test_the_readme_has_the_table_of_the_script(scaling: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count(scaling.table()) == 1
    assert scaling.put_between_marks(readme) == readme


def test_the_readme_has_formulas_and_assumptions(scaling: ModuleType) -> None:
    table = scaling.table()
    for said in ("c(n) = max(", "12 N_s / S", "Left out", "3.35 TB/s 60% are", "5% of 80 GB"):
        assert table.count(said) == 1, said


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_on_paper_are_those_of_the_models(scaling: ModuleType, name: str) -> None:
    published, _ = MODELS[name]
    (paper,) = [model for pair in scaling.PAIRS for model in pair if model.name == name]
    real = without_storage(name, torch.bfloat16)
    assert sum(p.numel() for p in real.parameters()) == published
    assert paper.parameters == pytest.approx(published, rel=1e-3)
    inside = [m for m in real.model.modules() if isinstance(m, torch.nn.Linear)]
    assert paper.linear == sum(m.weight.numel() for m in inside)
    assert paper.kv == kv_bytes(CausalLM(real))


@pytest.mark.parametrize("tied", [False, True])
def test_nf4_bytes_are_those_of_a_quantised_model(
    scaling: ModuleType, tmp_path: Path, tied: bool
) -> None:
    """The weights that bitsandbytes packs, their scales and code books, and what it leaves alone."""
    save_model(
        tmp_path,
        dtype=torch.bfloat16,
        vocab_size=4096,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **sizes(512, 1024, 2, 8, 4, 64),
    )
    config = TeacherConfig(base_model=str(tmp_path), load_in_4bit=True)  # the project's defaults
    teacher = load_teacher(config, torch.device("cpu"))
    held = sum(map(bytes_held, teacher.parameters()))
    paper = scaling.Model("m", 2, 512, 1024, 8, 4, 64, 4096, tied)
    run = scaling.Run(paper, paper, 1, scaling.FOUR_BIT)
    assert scaling.teacher_bytes(run) == pytest.approx((held, held), rel=5e-3)


def bytes_held(parameter: torch.nn.Parameter) -> int:
    if not isinstance(parameter, Params4bit):
        return parameter.nbytes
    state = parameter.quant_state
    nested = state.state2
    scales = (state.absmax, state.code, state.offset, nested.absmax, nested.code)
    return parameter.nbytes + sum(tensor.nbytes for tensor in scales)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_what_autocast_leaves_in_float32(scaling: ModuleType, weights: torch.dtype) -> None:
    """z: a layer's input and rotated keys, against a real forward; values are in bf16 anyway."""
    model = tiny_model("qwen2", seed=1).to(weights)
    lm = CausalLM(model, precision=partial(torch.autocast, "cpu", torch.bfloat16))
    inputs = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    cache = lm.new_cache(num_rows=3, num_slots=10)
    with torch.no_grad():
        lm.prefill(torch.ones(3, 4, dtype=torch.long), torch.arange(3), cache)
    (layer, *_) = cache.layers
    assert (inputs, layer.keys.dtype, layer.values.dtype) == ([weights], weights, torch.bfloat16)
    student, teacher = scaling.PAIRS[0]
    run = scaling.Run(student, teacher, 8, "replicated" if weights.itemsize == 4 else "sharded")
    assert run.stream == weights.itemsize
    of_cache = layer.keys.itemsize + layer.values.itemsize
    assert run.student_kv == student.kv / 4 * of_cache


# The forecast counts other than the script, for
#   both         logits of 16 drafted tokens at most
#   replicated   the student's caches wholly in float32, the head's gradient at 12 bytes a number
#   the others   bf16 weights and gradients beside float32 masters, as ZeRO-3 keeps them: 14 bytes a
#                number in the rollout, where float32 weights are 12.
@pytest.mark.parametrize("pair", [0, 1, 2])
@pytest.mark.parametrize(
    ("placement", "gpus", "tolerance"),
    [
        ("replicated", 1, 0.03),
        ("replicated", 8, 0.03),
        ("sharded", 8, 0.05),
        ("by layer", 8, 0.05),
        ("by layer", 64, 0.05),
    ],
)
def test_memory_is_that_of_the_forecast(
    scaling: ModuleType, pair: int, placement: str, gpus: int, tolerance: float
) -> None:
    run = scaling.Run(*scaling.PAIRS[pair], gpus, placement)
    whole = placement == "replicated"
    dtype = torch.float32 if whole else torch.bfloat16
    student = CausalLM(without_storage(run.student.name, dtype))
    teacher = CausalLM(without_storage(run.teacher.name, torch.bfloat16))
    teacher.model.requires_grad_(False)
    shape = StepShape(
        window_rows=8,
        rows_in_flight=8,
        batch_rows=8,
        prompt_tokens=256,
        new_tokens=512,
        row_tokens=768,
        reads_data=False,
        source=Source.INTERLEAVED,
        checkpointing=True,
        activation_bytes=2,
        optimizer="adamw_torch",
    )
    engine = Engine.WHOLE if whole else Engine.ZERO_3
    division = Division(engine, gpus, teacher=not whole, by_layer=placement == "by layer")
    there = on_each_rank(forecast(student, teacher, shape), student, teacher, shape, division)
    expected = [sum(phase.values()) for phase in (there.rollout, there.training)]
    assert scaling.memory(run) == pytest.approx(expected, rel=tolerance)


def test_a_quantised_teacher_takes_the_place_of_a_spread_one(scaling: ModuleType) -> None:
    packed, spread = (scaling.Run(*scaling.PAIRS[2], 8, name) for name in ("4-bit", "sharded"))
    for phase in (0, 1):
        less = scaling.memory(spread)[phase] - scaling.memory(packed)[phase]
        of_teacher = scaling.teacher_bytes(spread)[phase] - scaling.teacher_bytes(packed)[phase]
        assert less == pytest.approx(of_teacher)


def test_what_fits_leaves_a_reserve(scaling: ModuleType) -> None:
    run = scaling.Run(*scaling.PAIRS[0], 1, "replicated")
    needed = max(scaling.memory(run))
    for room, enough in ((1.04, False), (1.06, True)):
        device = scaling.Device(memory=room * needed)
        assert scaling.fits(replace(run, device=device)) is enough


def test_seconds_by_hand(scaling: ModuleType) -> None:
    """Small models on a round device: what a forward reads decides, and two rows are little."""
    # 10 layers of (2 x (8 + 2) x 50 + 3 x 2000) x 1000, a head of 1000 x 1000, and so on.
    student = scaling.Model("s", 10, 1000, 2000, 8, 2, 50, 1000)
    teacher = scaling.Model("t", 20, 2000, 4000, 16, 4, 50, 1000, tied=True)
    linear, head = (70e6, 560e6), (1e6, 2e6)
    device = scaling.Device(
        bandwidth=scaling.Rate(2e12, 0.5),
        speed=scaling.Rate(2e15, 0.5),
        node_link=scaling.Rate(2e11, 0.5),
        wide_link=scaling.Rate(2e10, 0.5),
    )
    step = scaling.Step(rows=2, prompt=100, completion=200, draft=2, acceptance=0.5)

    def seconds(gpus: int, placement: str):
        return scaling.seconds(scaling.Run(student, teacher, gpus, placement, step, device))

    alone = seconds(1, "replicated")
    written, rounds = 2 * 200, 200 / 1.5  # slots: both prompts, half of both completions
    keys_and_values = (10 * 2 * 50 * (4 + 2), 20 * 4 * 50 * (2 + 2))
    read = [2 * (a + b) for a, b in zip(linear, head, strict=True)]
    draft, check = (
        (weights + written * kv) / 1e12 for weights, kv in zip(read, keys_and_values, strict=True)
    )
    assert alone.rollout == pytest.approx(sum(read) / 1e12 + rounds * (2 * draft + check))
    products = 8 * 70e6 * 600 + (6 * 1e6 + 2 * 2e6) * 400
    assert alone.training == pytest.approx(products / 1e15 + 28 * 72e6 / 1e12)
    assert alone.exchange == 0

    unpacked = seconds(1, "4-bit").rollout - alone.rollout
    assert unpacked == pytest.approx((1 + rounds) * (33 / 64 + 2) * 560e6 / 1e12, rel=1e-3)
    many = seconds(8, "replicated")
    assert many[:2] == alone[:2]
    assert many.exchange == pytest.approx(7 / 8 * 8 * 72e6 / 1e11)
    spread, layers = seconds(8, "sharded"), seconds(8, "by layer")
    assert spread.exchange == pytest.approx(7 / 8 * (10 * 72e6 + 2 * 562e6) / 1e11)
    assert layers.exchange == pytest.approx(7 / 8 * (10 * 72e6 + 2 * 2e6) / 1e11)
    fetched = layers.rollout - spread.rollout
    assert fetched == pytest.approx((1 + rounds) * 7 / 8 * 2 * 560e6 / 1e11)
    nodes = seconds(16, "sharded").exchange
    assert nodes == pytest.approx(15 / 16 * (10 * 72e6 + 2 * 562e6) / 1e10)


def test_more_rows_are_free_until_computing_takes_longer(scaling: ModuleType) -> None:
    """What the README says of them, found by trying: the first rows whose check costs more."""
    device = scaling.Device(bandwidth=scaling.Rate(1e12, 1.0), speed=scaling.Rate(1e14, 1.0))
    run = scaling.Run(*scaling.PAIRS[0], 1, "replicated", scaling.Step(prompt=1), device)
    assert "= 100 tokens on: a verification of 20 rows" in scaling.more_rows(run)
    # A student and a teacher without caches, so that only their weights are read.
    bare = [replace(model, kv_heads=0) for model in scaling.PAIRS[0]]

    def rollout(rows: int) -> float:
        step = scaling.Step(rows=rows, prompt=1)
        return scaling.seconds(scaling.Run(*bare, 1, "replicated", step, device)).rollout

    assert rollout(20) == pytest.approx(rollout(1))
    assert rollout(21) > 1.02 * rollout(1)
