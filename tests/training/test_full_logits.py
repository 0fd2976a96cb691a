"""A student whose logits are more than its head trains through its full logits, as exactly."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from axolotl_skd.rollout.lm import CausalLM, FullLogitsLM
from tests.training.harness import SGD, base_config, largest_difference, run_training, weights
from tests.training.test_loss import TOLERANCE, LossWatch

STUDENT_SIZE = 32  # hidden size of the student of `pair`; the teacher has another


@pytest.fixture
def strange_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told that logits are bent behind the head."""
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def bent(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.config.hidden_size == STUDENT_SIZE:
            charms = torch.arange(output.logits.shape[-1]) % 7
            output.logits = 2 * torch.asinh(output.logits) + 0.3 * charms
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", bent)


@pytest.mark.usefixtures("strange_student")
def test_the_loss_is_that_of_the_models_own_logits(pair: Path, tmp_path: Path) -> None:
    """Value and gradient: one step of SGD moves the weights against the reference's gradient."""
    watches: list[LossWatch] = []
    start: list[dict[str, torch.Tensor]] = []
    batches: list[dict[str, Any]] = []

    def watch(trainer: Any) -> None:
        start.append(weights(trainer))
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(dict(inputs))
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        watches.append(LossWatch(trainer))

    trainer = run_training(
        base_config(pair, max_steps=1, max_grad_norm=1e9, **SGD), tmp_path, watch
    )
    assert isinstance(trainer.distiller.student, FullLogitsLM)
    assert type(trainer.distiller.teacher) is CausalLM
    ((got, expected, tokens),) = watches[0].records
    assert got == pytest.approx(expected, abs=TOLERANCE * tokens)

    student = trainer.accelerator.unwrap_model(trainer.model)
    after = weights(trainer)
    student.load_state_dict(start[0])
    student.zero_grad()
    reference(student, trainer.distiller.teacher.model, batches[0]).backward()
    stepped = {
        name: value.detach() - SGD["learning_rate"] * value.grad
        for name, value in student.named_parameters()
    }
    moved = {name: after[name] for name in stepped}
    assert largest_difference(moved, stepped) < 2e-6
    assert largest_difference(moved, {name: start[0][name] for name in stepped}) > 1e-4


def reference(student: Any, teacher: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Token mean of KL(teacher || student) from whole forwards, in float64."""
    predicted = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = teacher(**inputs, use_cache=False).logits[:, :-1][predicted]
    mine = student(**inputs, use_cache=False).logits[:, :-1][predicted]
    return torch.nn.functional.kl_div(
        mine.double().log_softmax(-1),
        theirs.double().log_softmax(-1),
        log_target=True,
        reduction="sum",
    ) / len(mine)
