"""Scaling on paper: formulas by hand, and facts that do not come from them.

Those facts are the sizes of real models, the bytes of a really quantised one, and the project's own
memory forecast, made from modules instead of formulas.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
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
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.types import Source
from axolotl_skd.sharding import Engine
from axolotl_skd.teacher import load_teacher
from tests.helpers import save_model

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
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MODELS[name][1], dtype=dtype)


def test_the_readme_has_the_table_of_the_script(scaling: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count(scaling.table()) == 1
    assert scaling.put_between_marks(readme) == readme


def test_the_readme_has_formulas_and_assumptions(scaling: ModuleType) -> None:
    table = scaling.table()
    for said in ("c(n) = max(", "12 N_s / S", "Left out:", "of whose 3.35 TB/s 60% are", "5% of 80 GB"):
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
    sizes_here = sizes(512, 1024, 2, 8, 4, 64)
    save_model(
        tmp_path,
        dtype=torch.bfloat16,
        vocab_size=4096,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **sizes_here,
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


@pytest.mark.parametrize("pair", [0, 1, 2])
@pytest.mark.parametrize(
    ("placement", "gpus"),
    [("replicated", 1), ("replicated", 8), ("sharded", 8), ("by layer", 8), ("by layer", 64)],
)
def test_memory_is_that_of_the_forecast(
    scaling: ModuleType, pair: int, placement: str, gpus: int
) -> None:
    run = scaling.Run(*scaling.PAIRS[pair], gpus, placement)
    whole = run.sharing == 1
    student = CausalLM(
        without_storage(run.student.name, torch.float32 if whole else torch.bfloat16)
    )
    teacher = CausalLM(without_storage(run.teacher.name, torch.bfloat16))
    teacher.model.requires_grad_(False)
    step = run.step
    shape = StepShape(
        window_rows=step.rows,
        rows_in_flight=step.rows,
        batch_rows=step.rows,
        prompt_tokens=step.prompt,
        new_tokens=step.completion,
        row_tokens=step.prompt + step.completion,
        reads_data=False,
        source=Source.INTERLEAVED,
        checkpointing=True,
        activation_bytes=2,
        optimizer="adamw_torch",
    )
    division = Division(
        Engine.WHOLE if whole else Engine.FSDP_2, gpus, teacher=not whole, by_layer="layer" in placement
    )
    there = on_each_rank(forecast(student, teacher, shape), student, teacher, shape, division)
    got = scaling.memory(run)
    print(placement, gpus, pair, got.rollout / sum(there.rollout.values()), got.training / sum(there.training.values()))
    print({k: round(v/2**30,2) for k,v in there.training.items()}, got.training/2**30)
    print({k: round(v/2**30,2) for k,v in there.rollout.items()}, got.rollout/2**30)
