"""Pairs to measure on: random weights of stated sizes, made on the spot, and the embedded tiny pair.

Speed does not depend on what the weights say, with one exception: sampling looks at few tokens when
the distribution is peaked. So the last norm of a random model is scaled until its logits have a
standard deviation of 8, about as peaked as a language model's.

`--quick` keeps the family and shrinks everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from axolotl_skd.resources import resource_path

LOGIT_STD = 8.0

_TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A student and its teacher in evaluation mode, of one vocabulary.

    Attributes:
        name: key of `PAIRS`, or "tiny".
        student, teacher: the models.
        description: sizes and dtype in words.
    """

    name: str
    student: PreTrainedModel
    teacher: PreTrainedModel
    description: str

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def exact(self) -> bool:
        """Is the arithmetic fine enough that equal algorithms must give equal tokens?"""
        return self.student.dtype == torch.float32


@dataclass(frozen=True, slots=True)
class _Sizes:
    config: Callable[..., PreTrainedConfig]
    dtype: torch.dtype
    vocab_size: int
    student: dict[str, Any]
    teacher: dict[str, Any]


PAIRS = {
    "cpu": _Sizes(
        LlamaConfig,
        torch.float32,
        32_000,
        dict(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
        ),
        dict(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=64,
        ),
    ),
    "gemma": _Sizes(  # Gemma 2B and 7B
        GemmaConfig,
        torch.bfloat16,
        256_000,
        dict(
            hidden_size=2048,
            intermediate_size=16384,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=256,
        ),
        dict(
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
        ),
    ),
    "qwen2": _Sizes(  # Qwen2 0.5B and 7B; the 7B's head is padded further, which GKD would refuse
        Qwen2Config,
        torch.bfloat16,
        151_936,
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
    ),
}


def default_models(device: torch.device) -> str:
    """A pair whose full size suits the device."""
    return "gemma" if device.type == "cuda" else "cpu"


def make_pair(name: str, device: torch.device, quick: bool = False) -> Pair:
    """A pair of random weights.

    Args:
        name: key of `PAIRS`.
        device: where to make it.
        quick: tiny sizes of the family, in float32.
    """
    sizes = PAIRS[name]
    dtype = torch.float32 if quick else sizes.dtype
    models = []
    for seed, own in enumerate((sizes.student, sizes.teacher)):
        shape = {"vocab_size": sizes.vocab_size, "tie_word_embeddings": sizes.config is GemmaConfig}
        shape |= own
        if quick:
            shape |= _TINY | {"hidden_size": 64 * (seed + 1), "intermediate_size": 128 * (seed + 1)}
        models.append(_random_model(sizes.config, shape, dtype, device, seed))
    return _pair(f"{name} (quick)" if quick else name, *models)


def load_tiny_pair(device: torch.device) -> Pair:
    """The trained pair that comes with the package."""
    folder = Path(resource_path("example_configs")) / "tiny"
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32).to(device).eval()
        for role in ("student", "teacher")
    )
    return _pair("tiny", student, teacher)


def tiny_tokenizer() -> Any:
    """The embedded pair's."""
    return AutoTokenizer.from_pretrained(Path(resource_path("example_configs")) / "tiny/student")


def random_prompts(
    num_rows: int, vocab_size: int, shortest: int = 40, longest: int = 64, seed: int = 3
) -> tuple[Tensor, ...]:
    """Ragged prompts of uniformly random tokens: int64 [P_b] each, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num_rows,), generator=generator).tolist()
    return tuple(torch.randint(3, vocab_size, (n,), generator=generator) for n in lengths)


def skewed_lengths(num_rows: int, shortest: int, longest: int, seed: int = 4) -> Tensor:
    """Log-uniform completion lengths, int64 [num_rows]: many short ones, a few long ones."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(num_rows, generator=generator)
    lengths = shortest * (longest / shortest) ** share
    return lengths.round().long()


def left_padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask as `generate` wants them, int64 [B, P] each."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


def _random_model(
    config_type: Callable[..., PreTrainedConfig],
    shape: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> PreTrainedModel:
    # No token ends a sequence, so that every contender makes the same number of tokens.
    config = config_type(
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attention_dropout=0.0,
        **shape,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    factor = LOGIT_STD / (config.initializer_range * math.sqrt(config.hidden_size))
    with torch.no_grad():
        # Gemma's norm multiplies by 1 + weight.
        model.model.norm.weight.fill_(factor - 1 if config_type is GemmaConfig else factor)
    return model.eval().requires_grad_(False)


def _pair(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> Pair:
    sizes = " and ".join(_size(model) for model in (student, teacher))
    vocab = student.get_output_embeddings().weight.shape[0]
    dtype = str(student.dtype).removeprefix("torch.")
    return Pair(name, student, teacher, f"{name}: {sizes} parameters, V = {vocab:,}, {dtype}")


def _size(model: PreTrainedModel) -> str:
    number = model.num_parameters()
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
