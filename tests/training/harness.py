"""Training runs in this process on a random tiny pair: `axolotl train` minus the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.train import train as axolotl_train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from axolotl_skd.plugin import SKDPlugin
from axolotl_skd.trainer import DistillationTrainer

TOKENIZER = Path(__file__).parents[2] / "example_configs" / "tiny" / "teacher"


# Adam divides by the root of a tiny second moment and so magnifies rounding of the gradient; SGD keeps
# differences between two ways of computing the same thing as small as they are.
SGD = {"optimizer": "sgd", "learning_rate": 0.05}


def save_model(
    folder: Path,
    *,
    seed: int,
    hidden: int = 32,
    layers: int = 2,
    sharpness: float = 12.0,
    tied: bool = False,
    **extra: Any,
) -> Path:
    """A random Llama over the tiny tokenizer; `sharpness` makes its predictions uneven."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int, first: int = 0) -> Path:
    """Chat rows of unequal length."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i % 7}?" + " Please." * (i % 3)},
                {"role": "assistant", "content": f"It is {i + i % 7}." + " Yes." * (i % 4)},
            ]
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def base_config(folder: Path, **overrides: Any) -> dict[str, Any]:
    """A config of 4 steps of 4 rows on the pair in `folder` (see the `pair` fixture)."""
    config: dict[str, Any] = {
        "base_model": str(folder / "student"),
        "plugins": ["axolotl_skd.SKDPlugin"],
        "distillation": {
            "method": "skd",
            "teacher": {"base_model": str(folder / "teacher")},
            "rollout": {
                "max_prompt_tokens": 64,
                "max_new_tokens": 12,
                "num_draft_tokens": 3,
                "teacher_top_k": 20,
                # Many stop tokens, so that rows end at different lengths.
                "stop_token_ids": list(range(20, 512, 8)),
            },
        },
        "datasets": [
            {
                "path": str(folder / "train.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
                "split": "train",
            }
        ],
        "val_set_size": 0,
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "sequence_len": 128,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "num_epochs": 4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "dataloader_pin_memory": False,
    }
    for key, value in overrides.items():
        if key in ("method", "rollout", "teacher"):
            block = config["distillation"]
            block[key] = {**block[key], **value} if isinstance(value, dict) else value
        else:
            config[key] = value
    return {key: value for key, value in config.items() if value is not None}


def validation_set(folder: Path) -> dict[str, Any]:
    """Keys that add the fixture's validation rows."""
    return {
        "test_datasets": [
            {
                "path": str(folder / "validation.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
                "split": "train",
            }
        ],
        "val_set_size": None,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_batch_size": 4,
    }


@contextmanager
def on_trainer(action: Callable[[DistillationTrainer], None] | None) -> Iterator[None]:
    """Run `action` on the assembled trainer, before training."""
    original = SKDPlugin.post_trainer_create

    def hook(self: SKDPlugin, cfg: Any, trainer: DistillationTrainer) -> None:
        original(self, cfg, trainer)
        if action is not None:
            action(trainer)

    SKDPlugin.post_trainer_create = hook
    try:
        yield
    finally:
        SKDPlugin.post_trainer_create = original


def run_training(
    config: dict[str, Any],
    output_dir: Path,
    action: Callable[[DistillationTrainer], None] | None = None,
) -> DistillationTrainer:
    """Load, train, save; returns the trainer (its `state.log_history` has the log lines)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "config.yml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(output_dir)}))
    PluginManager.get_instance().plugins.clear()
    cfg = load_cfg(str(path))
    meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    with on_trainer(action):
        _, _, trainer = axolotl_train(cfg=cfg, dataset_meta=meta)
    PluginManager.get_instance().post_train_unload(cfg)
    return trainer


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """A copy of the student's weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def saved_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """What was saved at the end of a run."""
    return AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
