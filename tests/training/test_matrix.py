"""Every method and every divergence, fine-tuning whole or with LoRA: two steps of each.

Each method meets both kinds of fine-tuning, each divergence stands once on `skd` and meets both kinds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from axolotl_skd.losses.divergences import DIVERGENCES
from axolotl_skd.methods import METHODS
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import base_config, run_training, weights

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
TUNINGS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}


@dataclass(frozen=True, slots=True)
class Cell:
    """What is trained; without a divergence it is the method's own."""

    method: str
    tuning: str
    divergence: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method, self.tuning, self.divergence)))


CELLS = [
    Cell("skd", "full", "forward_kl"),
    Cell("skd", "lora", "reverse_kl"),
    Cell("skd", "full", "jsd"),
    Cell("skd", "lora", "skew_kl"),
    Cell("skd", "full", "skew_reverse_kl"),
    Cell("skd", "lora", "tvd"),
    Cell("on_policy_kd", "full", "reverse_kl"),
    Cell("on_policy_kd", "lora"),
    Cell("supervised_kd", "full"),
    Cell("supervised_kd", "lora", "forward_kl"),
    Cell("speckd", "full"),
    Cell("speckd", "lora"),
    Cell("imitkd", "full", "skew_kl"),
    Cell("imitkd", "lora"),
    Cell("gkd", "full"),
    Cell("gkd", "lora", "jsd"),
    Cell("mixed_skd", "full", "tvd"),
    Cell("mixed_skd", "lora"),
    Cell("two_stage", "full"),
    Cell("two_stage", "lora", "skew_reverse_kl"),
    Cell("seqkd", "full"),
    Cell("seqkd", "lora"),
    Cell("sft", "full"),
    Cell("sft", "lora"),
]

ROLLOUT = {
    f"rollout/{name}"
    for name in ("length", "truncated_share", "tokens_per_second", "seconds", "share")
}
INTERLEAVED = ROLLOUT | {
    *("skd/acceptance_rate", "skd/teacher_top_k"),
    *("rollout/draft_efficiency", "rollout/draft_length"),
}
# Means over sampled rows or tokens, which a step without any cannot have.
OF_SAMPLES = {
    *("rollout/length", "rollout/truncated_share", "rollout/draft_efficiency"),
    *("rollout/draft_length", "skd/acceptance_rate"),
}
METRICS: dict[str, set[str]] = {
    "skd": INTERLEAVED,
    "mixed_skd": INTERLEAVED,
    "on_policy_kd": ROLLOUT,
    "imitkd": ROLLOUT,
    "gkd": ROLLOUT,
    "two_stage": ROLLOUT,
    "seqkd": ROLLOUT,
    "supervised_kd": set(),
    "speckd": {"gate/token_acceptance_rate"},
    "sft": set(),
}


class GradientWatch(TrainerCallback):
    """Which trained parameters had a gradient at each step, by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, bool]] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad.isfinite().all() for p in trained.values())
        self.steps.append({name: bool(p.grad.any()) for name, p in trained.items()})


def test_the_cells_are_all_that_is_asked_for() -> None:
    assert len(CELLS) == len(set(CELLS)) <= 25
    pairs = set(itertools.product(METHODS, TUNINGS))
    assert {(cell.method, cell.tuning) for cell in CELLS} == pairs
    divergences = {(cell.divergence, cell.tuning) for cell in CELLS if cell.divergence}
    assert divergences == set(itertools.product(DIVERGENCES, TUNINGS))
    assert {cell.divergence for cell in CELLS if cell.method == "skd"} == set(DIVERGENCES)
    assert METRICS.keys() == METHODS.keys()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_two_steps(pair: Path, tmp_path: Path, cell: Cell) -> None:
    config = base_config(pair, method=cell.method, max_steps=2, **TUNINGS[cell.tuning])
    config["dataset_prepared_path"] = str(tmp_path / "prepared")
    if cell.divergence:
        config["distillation"]["loss"] = {"divergence": cell.divergence}
    if (
        cell.method == "speckd"
    ):  # of 512 tokens; by the default of 5 this random pair learns nothing
        config["distillation"]["gate"] = {"top_k": 200}
    watch, start = GradientWatch(), {}

    def before(trainer: DistillationTrainer) -> None:
        trainer.add_callback(watch)
        start.update(weights(trainer))

    trainer = run_training(config, tmp_path / "out", before)
    assert type(trainer).method is METHODS[cell.method]

    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(watch.steps) == 2
    for line in lines:
        assert math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf
        metrics = {key for key in line if key.split("/")[0] in ("rollout", "skd", "gate")}
        nothing_sampled = line.get("rollout/share") == 0  # a coin, or before the switch
        assert metrics == METRICS[cell.method] - (OF_SAMPLES if nothing_sampled else set())
        assert {"memory/peak_gib", "memory/predicted_gib"} < line.keys()
        assert ("ppl" in line) == (cell.method in ("sft", "seqkd"))

    first, second = watch.steps
    if cell.tuning == "full":
        assert all(first.values()) and all(second.values())
        assert len(first) == len(list(trainer.model.parameters()))
    else:
        # A fresh B is zero, so A has no gradient before it has moved.
        assert first and all(learns == ("lora_B" in name) for name, learns in first.items())
        assert all(second.values())
    end = weights(trainer)
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    if cell.tuning == "full":
        assert moved == end.keys()
    else:
        assert moved == {name for name in end if "lora_" in name}

    teacher = trainer.distiller.teacher
    assert (teacher is None) == (cell.method in ("sft", "seqkd"))
    if teacher is not None:
        saved = AutoModelForCausalLM.from_pretrained(pair / "teacher").state_dict()
        for name, parameter in teacher.model.named_parameters():
            assert not parameter.requires_grad and parameter.grad is None
            assert torch.equal(parameter, saved[name])
