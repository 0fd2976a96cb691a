"""Tiny random causal LMs of every supported family, in which attention and position matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel

VOCAB_SIZE = 300
STOP_IDS = (0, 17, 42, 123, 171, 204, 271)  # the pad token among them
WINDOW = 16  # shorter than most of the sequences

# Initial weights ten times the usual: in a tiny model that lets attention, and so the whole prefix,
# decide the next token; otherwise a wrong mask could go unnoticed.
_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=0,
    pad_token_id=0,  # pad == eos, as with many real tokenizers
)
_FULL, _SLIDING = "full_attention", "sliding_attention"

# name -> (module of transformers.models, class prefix, attention implementation, config keywords)
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", "sdpa", {}),
    "qwen2": ("qwen2", "Qwen2", "sdpa", {}),
    "qwen2_window": (
        "qwen2",
        "Qwen2",
        "sdpa",
        dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": ("qwen3", "Qwen3", "sdpa", dict(head_dim=8)),
    "gemma": ("gemma", "Gemma", "sdpa", dict(head_dim=8)),
    "gemma2": ("gemma2", "Gemma2", "eager", dict(head_dim=8, sliding_window=WINDOW)),
    "gemma3": (
        "gemma3",
        "Gemma3",
        "sdpa",
        dict(head_dim=8, sliding_window=WINDOW, layer_types=(_SLIDING, _FULL, _SLIDING)),
    ),
    "mistral": ("mistral", "Mistral", "sdpa", dict(sliding_window=WINDOW)),
    "phi3": ("phi3", "Phi3", "sdpa", dict(sliding_window=WINDOW)),
    "cohere": ("cohere", "Cohere", "sdpa", dict(logit_scale=0.3)),
    "cohere2": (
        "cohere2",
        "Cohere2",
        "sdpa",
        dict(
            head_dim=8,
            logit_scale=0.3,
            sliding_window=WINDOW,
            layer_types=(_SLIDING, _FULL, _SLIDING),  # full layers have no positions
        ),
    ),
    "granite": (
        "granite",
        "Granite",
        "sdpa",
        dict(
            logits_scaling=3.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.7,
            attention_multiplier=0.5,
        ),
    ),
    "olmo2": ("olmo2", "Olmo2", "sdpa", {}),
    "smollm3": ("smollm3", "SmolLM3", "sdpa", dict(no_rope_layers=(1, 0, 1))),
    "mixtral": ("mixtral", "Mixtral", "sdpa", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3Moe",
        "sdpa",
        dict(
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            norm_topk_prob=True,
        ),
    ),
}
# Keywords that have one entry per layer, for as many as there may be.
_BY_LAYER = ("layer_types", "no_rope_layers")


def tiny_model(
    family: str,
    seed: int,
    hidden_size: int = 32,
    num_layers: int = 2,
    sharpness: float = 1.0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model in evaluation mode, fp32 on the CPU.

    Args:
        family: a key of `FAMILIES`.
        seed: of the weights.
        hidden_size: a multiple of 8.
        num_layers: at least 2, so that layer types mix.
        sharpness: factor on the output embedding, for peaky distributions.
        overrides: more keywords of the configuration.
    """
    module_name, prefix, attention, options = FAMILIES[family]
    package = f"transformers.models.{module_name}"
    config_class = "Gemma3TextConfig" if family == "gemma3" else f"{prefix}Config"
    options = dict(options)
    for key in _BY_LAYER:
        if key in options:
            options[key] = list(options[key][:num_layers])
    config = getattr(import_module(f"{package}.configuration_{module_name}"), config_class)(
        **{
            **_COMMON,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            **options,
            **overrides,
        }
    )
    config._attn_implementation = attention
    model_class = getattr(
        import_module(f"{package}.modeling_{module_name}"), f"{prefix}ForCausalLM"
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    _randomise_vectors(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model


@torch.no_grad()
def _randomise_vectors(model: PreTrainedModel) -> None:
    """Biases and norm weights start at constants that would hide their being left out."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    """Token ids over the whole vocabulary, stop tokens and pads included."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def closeness(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest KL(reference || logits) over the positions, in float64."""
    reference_logprobs = reference.double().log_softmax(-1)
    difference = reference_logprobs - logits.double().log_softmax(-1)
    return float((reference_logprobs.exp() * difference).sum(-1).max())


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
