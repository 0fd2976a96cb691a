"""Tiny random models and tokenizers on disk, for tests that need real folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 32
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"  # ids 0, 1, 2; then w3, w4, ...


def word_vocab(size: int = VOCAB_SIZE) -> dict[str, int]:
    """Token -> id of the tokenizer that `save_tokenizer` makes."""
    tokens = [EOS, PAD, UNKNOWN, *(f"w{i}" for i in range(3, size))]
    return {token: i for i, token in enumerate(tokens)}


def save_tokenizer(
    folder: Path, vocab: dict[str, int] | None = None, eos_token: str | None = EOS
) -> PreTrainedTokenizerFast:
    """A tokenizer of whitespace-separated words, saved in `folder`."""
    words = Tokenizer(WordLevel(vocab or word_vocab(), unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=eos_token, pad_token=PAD, unk_token=UNKNOWN
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> LlamaForCausalLM:
    """A random Llama in evaluation mode, saved in `folder`.

    Args:
        folder: made if need be.
        seed: of the weights.
        dtype: of the weights.
        overrides: keywords of its configuration.
    """
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
            **overrides,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def save_pair(folder: Path, **teacher: Any) -> tuple[Path, Path]:
    """Folders of a student and a teacher with the same tokenizer.

    Args:
        folder: both are made in it.
        teacher: keywords of the teacher's configuration.
    """
    paths = folder / "student", folder / "teacher"
    for path in paths:
        save_tokenizer(path)
    save_model(paths[0], seed=1)
    save_model(paths[1], seed=2, **{"hidden_size": 32, **teacher})
    return paths
