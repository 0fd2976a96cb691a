"""Tiny random COMET checkpoints in the published layout, and the texts that tests score with them.

Deliberately without transformers and without this project's code: `make_comet_golden.py` builds the
same files in the environment of unbabel-comet. The weights come from numpy's legacy generator, whose
stream never changes.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

HIDDEN, LAYERS, INTERMEDIATE, POSITIONS = 16, 3, 24, 34  # 34 positions: texts are cut at 30 tokens

# (source, translation, reference)
SAMPLES = [
    ("মই ভাত খাওঁ।", "I eat rice.", "I am eating rice."),
    ("আজি বতৰ ভাল।", "the weather is good today", "The weather is fine today."),
    ("", "", ""),
    ("ঘৰ", "house " * 40, "the house"),  # cut
    ("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2, "the end", "the " * 29 + "end"),
    ("য়", "\u09df is \u09af\u09bc, ﬁne", "ｗｉｄｅ letters"),  # one letter only after NFKC
    ("  spaces\t and \u3000 more ", "a <pad> in the text", "</s> <s> <unk> <mask>"),
    ("the same", "the same", "the same"),
    ("漢字", "\u2028line", "x" * 100),
]

# name -> changes of BASE in both copies of the settings, or in the one that is named
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {"hparams.yaml": {"layer_transformation": "sparsemax_patch"}},
    "sparsemax": {},
    "softmax": {"layer_transformation": "softmax", "layer_norm": True},
    "sparsemax_patch": {"layer_transformation": "sparsemax_patch", "hidden_sizes": [10]},
    "sparsemax_norm_max": {"layer_norm": True, "pool": "max", "activations": "sigmoid"},
    "one_layer_cls": {"layer": 2, "pool": "cls", "final_activation": "Sigmoid"},
    "first_layer_avg": {"layer": 0, "hidden_sizes": [12, 9, 5]},
    "default_pool": {"pool": "default", "dropout": 0.0},
    "the_file_does_not_count": {"hparams.yaml": {"pool": "max", "layer_transformation": "softmax"}},
}

BASE: dict[str, Any] = {
    "activations": "Tanh",
    "batch_size": 4,
    "class_identifier": "regression_metric",
    "dropout": 0.1,
    "encoder_learning_rate": 1.0e-06,
    "encoder_model": "XLM-RoBERTa",
    "final_activation": None,
    "hidden_sizes": [24, 8],
    "keep_embeddings_frozen": True,
    "layer": "mix",
    "layer_norm": False,
    "layer_transformation": "sparsemax",
    "layerwise_decay": 0.95,
    "learning_rate": 1.5e-05,
    "loss": "mse",
    "nr_frozen_epochs": 0.3,
    "optimizer": "AdamW",
    "pool": "avg",
    "train_data": ["data/train.csv"],
    "validation_data": ["data/validation.csv"],
}


def build_encoder(folder: Path) -> Path:
    """Configuration and tokenizer of a tiny XLM-RoBERTa in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    config = {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaForMaskedLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-05,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    """Unigram pieces of XLM-R's kind: special tokens, letters, a few words; NFKC first."""
    words = ["▁the", "▁house", "▁is", "▁weather", "▁rice", "ing", "ে", "ভাল"]
    letters = "▁abcdefghijklmnopqrstuvwxyzITজআতৰভলমইওখঘ।.,য়"
    pieces = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(word, -3.0 - 0.1 * i) for i, word in enumerate(words)]
    pieces += [(letter, -8.0 - 0.01 * i) for i, letter in enumerate(dict.fromkeys(letters))]
    tokenizer = Tokenizer(Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


def build_checkpoint(folder: Path, encoder: Path, variant: str) -> Path:
    """`hparams.yaml` and `checkpoints/model.ckpt` of a variant in `folder`."""
    changes = dict(VARIANTS[variant])
    changes_of_file = changes.pop("hparams.yaml", {})
    settings = {**BASE, "pretrained_model": str(encoder), **changes}
    vocab_size = json.loads((encoder / "config.json").read_text())["vocab_size"]
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hparams.yaml").write_text(
        yaml.safe_dump({**settings, **changes_of_file}), encoding="utf-8"
    )
    checkpoint = {
        "epoch": 1,
        "global_step": 100,
        "pytorch-lightning_version": "1.8.3.post1",
        "state_dict": _weights(settings, vocab_size),
        "hparams_name": "kwargs",
        "hyper_parameters": settings,
    }
    torch.save(checkpoint, folder / "checkpoints" / "model.ckpt")
    return folder


def _weights(settings: dict[str, Any], vocab_size: int) -> OrderedDict[str, torch.Tensor]:
    """Random weights under the published names, large enough that every part moves the score."""
    generator = np.random.RandomState(7)
    weights: OrderedDict[str, torch.Tensor] = OrderedDict()

    def add(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        values = mean + scale * generator.standard_normal(shape)
        weights[name] = torch.from_numpy(values.astype(np.float32))

    def linear(name: str, size_in: int, size_out: int) -> None:
        add(f"{name}.weight", size_out, size_in, scale=1.5 / math.sqrt(size_in))
        add(f"{name}.bias", size_out, scale=0.2)

    def norm(name: str) -> None:
        add(f"{name}.weight", HIDDEN, scale=0.2, mean=1.0)
        add(f"{name}.bias", HIDDEN, scale=0.2)

    embeddings = "encoder.model.embeddings"
    add(f"{embeddings}.word_embeddings.weight", vocab_size, HIDDEN, scale=1.0)
    add(f"{embeddings}.position_embeddings.weight", POSITIONS, HIDDEN, scale=0.5)
    add(f"{embeddings}.token_type_embeddings.weight", 1, HIDDEN, scale=0.5)
    norm(f"{embeddings}.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.model.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", HIDDEN, HIDDEN)
        linear(f"{layer}.attention.output.dense", HIDDEN, HIDDEN)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", HIDDEN, INTERMEDIATE)
        linear(f"{layer}.output.dense", INTERMEDIATE, HIDDEN)
        norm(f"{layer}.output.LayerNorm")
    if settings["layer"] == "mix":
        for i, value in enumerate((0.9, -0.6, 0.4, 0.1)):  # sparsemax leaves out the second
            weights[f"layerwise_attention.scalar_parameters.{i}"] = torch.tensor([value])
        weights["layerwise_attention.gamma"] = torch.tensor([1.3])
        if settings["dropout"]:
            weights["layerwise_attention.dropout_mask"] = torch.zeros(LAYERS + 1)
            weights["layerwise_attention.dropout_fill"] = torch.full((LAYERS + 1,), -1e20)
    size_in = 6 * HIDDEN
    for i, size_out in enumerate([*settings["hidden_sizes"], 1]):
        linear(f"estimator.ff.{3 * i}", size_in, size_out)
        size_in = size_out
    return weights
