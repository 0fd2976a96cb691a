"""Which students train, and how: the tables of the README's "Students" section, from real runs.

    python evals/support_matrix.py --write README.md

Every cell is two SKD steps of `axolotl train`, in this process, on a small random model of the family
and a teacher of the same family. It counts as working if

- the first loss is the one that stock forwards over whole rows give (full logits, float64),
- all losses are finite, and of the trainable weights all tensors that can move have moved,
- the rollout decoded from a KV cache,
- and what the column names was seen in the run, and nothing of the other columns.

Models that are refused are given as configurations without any weights, so that the refusal must come
before weights are looked for. `--families` and `--cells` pick some of both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import is_compiled_module
from bitsandbytes.nn import Params4bit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from axolotl_skd.resources import resource_path
from axolotl_skd.rollout.lm import CausalLM, UnsupportedModelError, rollout_mode

START, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
COMMAND = "python evals/support_matrix.py --write README.md"
STEPS = 2
NEW_TOKENS = ["<one>", "<two>"]
_FULL, _SLIDING = "full_attention", "sliding_attention"
# All widths are multiples of 64, the block of bitsandbytes' 4-bit numbers.
_SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.05,
    bos_token_id=None,
)
_WINDOW = dict(sliding_window=16)
_EXPERTS = dict(num_experts_per_tok=2)


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture.

    Attributes:
        name: with the models that have it.
        model_type: transformers' name.
        options: of its configuration, beside the sizes.
        attention: `attn_implementation`.
    """

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("Llama 2 and 3, SmolLM 1 and 2", "llama"),
        Family("Mistral", "mistral", _WINDOW),
        Family("Mixtral", "mixtral", dict(num_local_experts=4, **_EXPERTS)),
        Family("Qwen2, Qwen2.5", "qwen2"),
        Family("Qwen3", "qwen3"),
        Family("Qwen3-MoE", "qwen3_moe", dict(num_experts=4, moe_intermediate_size=64, **_EXPERTS)),
        Family("Gemma", "gemma"),
        Family("Gemma 2", "gemma2", _WINDOW, attention="eager"),
        Family("Gemma 3 (text)", "gemma3_text", dict(layer_types=[_SLIDING, _FULL], **_WINDOW)),
        Family("Phi-3, Phi-4", "phi3", _WINDOW),
        Family("SmolLM3", "smollm3", dict(no_rope_layers=[1, 0])),
        Family(
            "Granite",
            "granite",
            dict(
                logits_scaling=3.0,
                embedding_multiplier=2.0,
                residual_multiplier=0.7,
                attention_multiplier=0.5,
            ),
        ),
        Family("OLMo-2", "olmo2"),
        Family("Cohere (Command R)", "cohere", dict(logit_scale=0.3)),
        Family(
            "Cohere 2 (Command R7B)",
            "cohere2",
            dict(logit_scale=0.3, layer_types=[_SLIDING, _FULL], **_WINDOW),
        ),
    )
}

_LORA = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)

# Column -> Axolotl's keys. `tied` and `tokens` also decide how the models are made.
CELLS: dict[str, dict[str, Any]] = {
    "full": {},
    "tied head": {},
    "new tokens": dict(tokens=NEW_TOKENS),
    "LoRA": _LORA,
    "QLoRA": {**_LORA, "adapter": "qlora", "load_in_4bit": True},
    "DoRA": {**_LORA, "peft_use_dora": True},
    "checkpointing": dict(gradient_checkpointing=True),
    "bf16": dict(bf16=True),
    "bf16, fp32 masters": dict(bf16=True, fp32_master_weights=True),
    "compile": dict(torch_compile=True, torch_compile_backend="aot_eager"),
}

# Column -> what of `seen_of` there has to be.
SEEN: dict[str, set[str]] = {
    "full": set(),
    "tied head": {"a tied head"},
    "new tokens": {"more tokens"},
    "LoRA": {"LoRA"},
    "QLoRA": {"LoRA", "4-bit weights"},
    "DoRA": {"LoRA", "DoRA"},
    "checkpointing": {"checkpointing"},
    "bf16": {"bf16", "16-bit weights"},
    "bf16, fp32 masters": {"bf16"},
    "compile": {"compilation"},
}

# Named refused architectures -> (transformers' name, options).
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("mamba", {}),
    "Mamba 2": ("mamba2", {}),
    "Falcon Mamba": ("falcon_mamba", {}),
    "RWKV": ("rwkv", {}),
    "RecurrentGemma": ("recurrent_gemma", {}),
    "Jamba": ("jamba", {}),
    "Bamba": ("bamba", {"attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", {}),
    "Granite 4 (hybrid)": ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    "Qwen3-Next": ("qwen3_next", {"num_hidden_layers": 4}),
    "LFM2": ("lfm2", {"layer_types": ["conv", _FULL]}),
    "Llama 4": ("llama4_text", {}),
}


class CellError(RuntimeError):
    """A run that ended without the results it should have."""


# Models and data on disk


def save_model(
    family: Family, folder: Path, seed: int, tied: bool, new_tokens: Sequence[str] = ()
) -> Path:
    """A random model of the family, whose predictions are uneven."""
    config = AutoConfig.for_model(
        family.model_type, **{**_SIZES, **family.options}, tie_word_embeddings=tied
    )
    tokenizer = save_tokenizer(config, folder, new_tokens)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(config: PreTrainedConfig, folder: Path, new_tokens: Sequence[str] = ()) -> Any:
    """The embedded pair's, as the family's own class reads it (Qwen's adds a token), and the config."""
    embedded = Path(resource_path("example_configs")) / "tiny" / "teacher"
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(new_tokens))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_rows(path: Path, count: int = 8) -> Path:
    """Chat rows of unequal length."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i % 7}?" + " Please." * (i % 3)},
                {"role": "assistant", "content": f"It is {i + i % 7}."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: Path, student: Path, teacher: Path, **keys: Any) -> dict[str, Any]:
    """An Axolotl config of two SKD steps of four rows."""
    masters = keys.pop("fp32_master_weights", False)
    config = {
        "base_model": str(student),
        "plugins": ["axolotl_skd.SKDPlugin"],
        "distillation": {
            "method": "skd",
            "teacher": {"base_model": str(teacher)},
            "fp32_master_weights": masters,
            "rollout": {
                "max_prompt_tokens": 64,
                "max_new_tokens": 12,
                "num_draft_tokens": 3,
                "teacher_top_k": 100,
                "stop_token_ids": list(range(20, 512, 16)),
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
        "max_steps": STEPS,
        "num_epochs": STEPS,
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
        "output_dir": str(folder / "out"),
    }
    return config | keys


# One run


class Watch:
    """What a cell is judged by, taken from inside a run."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.before: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.expected: float | None = None
        self.cached = False
        self.seen: set[str] = set()

    def attach(self, trainer: Any) -> None:
        """Called on the assembled trainer."""
        self.trainer, inner = trainer, trainer.compute_loss
        self.before = {name: p.detach().clone() for name, p in self._trainable()}

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.expected is None:
                self.expected, self.seen = self._reference(inputs), seen_of(trainer)
            loss = inner(model, inputs, *args, **kwargs)
            self.losses.append(float(loss.detach()))
            return loss

        def see(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
            one_token = inputs["input_ids"].shape[1] == 1
            self.cached |= one_token and inputs.get("past_key_values") is not None

        trainer.compute_loss = compute_loss
        trainer.distiller.student.decoder.register_forward_pre_hook(see, with_kwargs=True)

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    def _reference(self, batch: dict[str, Any]) -> float:
        """Token mean of KL(teacher || student), by stock forwards of one row after the other."""
        distiller, total, count = self.trainer.distiller, 0.0, 0
        for row in range(len(batch["input_ids"])):
            ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
            predicting = slice(int(batch["prompt_lengths"][row]) - 1, -1)
            mine, theirs = (
                _logprobs(lm, ids)[predicting] for lm in (distiller.student, distiller.teacher)
            )
            total += float((theirs.exp() * (theirs - mine)).sum())
            count += len(mine)
        return total / count

    def verdict(self, expected: set[str], tolerance: float) -> str:
        """
        Args:
            expected: to be seen of the run.
            tolerance: of the first loss.

        Raises:
            CellError
        """
        if len(self.losses) != STEPS or not all(
            map(torch.isfinite, map(torch.tensor, self.losses))
        ):
            raise CellError(f"losses {self.losses}")
        if abs(self.losses[0] - self.expected) > tolerance * self.expected:
            raise CellError(
                f"a loss of {self.losses[0]}, where stock forwards give {self.expected}"
            )
        if self.seen != expected:
            raise CellError(f"seen was {self.seen}, asked for {expected}")
        if not self.cached:
            raise CellError("the rollout did not decode from a cache")
        still = [name for name, p in self._trainable() if torch.equal(p, self.before[name])]
        if not self.before or still:
            raise CellError(f"of {len(self.before)} trainable tensors did not move: {still[:5]}")
        views = (self.trainer.distiller.student, self.trainer.distiller.teacher)
        return "yes" if all(type(view) is CausalLM for view in views) else "full logits"


def seen_of(trainer: Any) -> set[str]:
    """What kind of training this is, by the live student and not by its config."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    parameters = dict(student.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    as_saved = AutoConfig.from_pretrained(trainer.axolotl_cfg.base_model)
    is_so = {
        "a tied head": head.weight is embeddings.weight,
        "more tokens": len(embeddings.weight) > as_saved.vocab_size,
        "LoRA": any("lora_A" in name for name in parameters),
        "DoRA": any("lora_magnitude_vector" in name for name in parameters),
        "4-bit weights": any(isinstance(p, Params4bit) for p in parameters.values()),
        "checkpointing": student.is_gradient_checkpointing,
        "bf16": trainer.accelerator.mixed_precision == "bf16",
        "16-bit weights": any(p.dtype == torch.bfloat16 for p in trained),
        "compilation": is_compiled_module(trainer.model_wrapped),
    }
    return {what for what, holds in is_so.items() if holds}


@torch.no_grad()
def _logprobs(lm: CausalLM, ids: Tensor) -> Tensor:
    """float64 [L, V] by the model's own forward, in the precision in which it computes."""
    with rollout_mode(lm.model), lm.precision():
        logits = lm.model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[:, : lm.vocab_size].double().log_softmax(-1)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Give the watch the trainer as the plugin has assembled it."""
    from axolotl_skd.plugin import SKDPlugin

    original = SKDPlugin.post_trainer_create

    def hook(self: Any, cfg: Any, trainer: Any) -> None:
        original(self, cfg, trainer)
        watch.attach(trainer)

    SKDPlugin.post_trainer_create = hook
    environment = dict(
        os.environ
    )  # Axolotl leaves the compiler's backend there, accelerate keeps it
    try:
        yield
    finally:
        SKDPlugin.post_trainer_create = original
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state()


def train(config: dict[str, Any], watch: Watch) -> None:
    """`axolotl train` without a process of its own."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train as axolotl_train

    output = Path(config["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yml").write_text(yaml.safe_dump(config))
    PluginManager.get_instance().plugins.clear()
    with watching(watch):
        cfg = load_cfg(str(output / "config.yml"))
        meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
        axolotl_train(cfg=cfg, dataset_meta=meta)


def run_cell(family: Family, cell: str, folder: Path, keys: Mapping[str, Any] | None = None) -> str:
    """`yes`, `full logits` (works, with more memory), or what went wrong.

    Args:
        family: of both models.
        cell: the column.
        folder: to work in.
        keys: Axolotl's, default the column's.
    """
    keys, tied = dict(CELLS[cell] if keys is None else keys), cell == "tied head"
    student = save_model(family, folder / "student", 1, tied)
    teacher = save_model(family, folder / "teacher", 2, tied, keys.get("tokens", ()))
    save_rows(folder / "train.jsonl")
    keys["attn_implementation"] = family.attention
    config = config_of(folder, student, teacher, **keys)
    config["distillation"]["teacher"]["attn_implementation"] = family.attention
    watch = Watch()
    try:
        train(config, watch)
        return watch.verdict(SEEN[cell], tolerance=0.05 if "bf16" in keys else 1e-3)
    except Exception as error:
        traceback.print_exc()
        return f"no ({type(error).__name__})"


def run_refusal(model_type: str, options: dict[str, Any], folder: Path) -> str:
    """Why the plugin refuses this configuration, of which no weights exist."""
    student, teacher = folder / "student", folder / "teacher"
    layers = {"num_hidden_layers": 2} | options
    save_tokenizer(AutoConfig.for_model(model_type, **layers), student)
    save_model(FAMILIES["llama"], teacher, 2, tied=False)
    save_rows(folder / "train.jsonl")
    try:
        train(config_of(folder, student, teacher), Watch())
    except UnsupportedModelError as error:
        reason = re.search(r"with (.*?)\. A rollout", str(error))[1]
        return reason.replace("['", "`").replace("']", "`")
    raise CellError(f"{model_type} was not refused")


# Tables


def tables(results: dict[str, dict[str, str]], refusals: dict[str, str], seconds: float) -> str:
    """Both tables, with the command that made them."""
    cells = list(CELLS)
    lines = [
        START,
        f"Made by `{COMMAND}` ({seconds / 60:.0f} minutes on one core).",
        "",
        _line("student", "`model_type`", *cells),
        _line(*["---"] * (len(cells) + 2)),
    ]
    for name, row in results.items():
        family = FAMILIES[name]
        lines.append(_line(family.name, f"`{name}`", *(row[cell] for cell in cells)))
    lines += ["", _line("refused", "`model_type`", "it has"), _line(*["---"] * 3)]
    for name, reason in refusals.items():
        lines.append(_line(name, f"`{REFUSED[name][0]}`", reason))
    return "\n".join([*lines, END])


def _line(*values: str) -> str:
    return "| " + " | ".join(values) + " |"


def put_between_marks(text: str, table: str) -> str:
    """`text` with the table in the place of what stands between the marks."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"the file needs each of {START} and {END} once")
    return text[: text.index(START)] + table + text[text.index(END) + len(END) :]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=list(CELLS))
    parser.add_argument("--write", type=Path, help="a file with the marks, e.g. README.md")
    args = parser.parse_args(arguments)
    complete = args.families == list(FAMILIES) and args.cells == list(CELLS)
    if args.write and not complete:
        parser.error("--write wants all families and cells")
    torch.set_num_threads(1)
    started, results = time.time(), {}
    # Axolotl takes a path with "mpt" in it, as in "tmpt", for a model of that family.
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
        for name in args.families:
            results[name] = dict.fromkeys(CELLS, "")
            for cell in args.cells:
                results[name][cell] = run_cell(FAMILIES[name], cell, Path(scratch))
                for made in ("student", "teacher", "out"):  # the prepared data are the same
                    shutil.rmtree(Path(scratch, made), ignore_errors=True)
                print(f"{FAMILIES[name].name}, {cell}: {results[name][cell]}", file=sys.stderr)
        refusals = {
            name: run_refusal(*REFUSED[name], Path(scratch, str(i)))
            for i, name in enumerate(REFUSED)
        }
    table = tables(results, refusals, time.time() - started)
    print(table)
    if args.write:
        args.write.write_text(put_between_marks(args.write.read_text(), table))


if __name__ == "__main__":
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
