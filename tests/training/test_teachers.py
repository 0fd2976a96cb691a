"""Teachers that are not a plain second model: an adapter, the student's own base, one that waits."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_skd.offload import Offloaded
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import (
    base_config,
    largest_difference,
    run_training,
    validation_set,
    weights,
)

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def disturb(trainer: DistillationTrainer) -> None:
    """An adapter that does something: a fresh one has no effect, and nothing to learn from its base."""
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)


def losses(trainer: DistillationTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def own_base(pair: Path, **keys: Any) -> dict[str, Any]:
    config = base_config(pair, **LORA, **keys)
    config["distillation"]["teacher"] = {"student_base": True}
    return config


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("skd", {}),
        ("supervised_kd", {}),
        ("skd", {"peft_use_dora": True}),
        *(
            (
                "supervised_kd",
                {
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                },
            )
            for reentrant in (True, False)
        ),
    ],
    ids=str,
)
def test_the_students_base_teaches_as_a_second_copy_of_it_would(
    pair: Path, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    """Targets and rollouts: the same losses and the same weights in the end."""
    own = run_training(own_base(pair, method=method, **keys), tmp_path / "own", disturb)
    teacher = {"base_model": str(pair / "student")}
    copy = base_config(pair, method=method, **LORA, **keys, teacher=teacher)
    other = run_training(copy, tmp_path / "copy", disturb)
    assert own.distiller.teacher.model is own.distiller.student.model
    assert losses(own) == losses(other)
    assert largest_difference(weights(own), weights(other)) == 0


def test_a_trained_student_and_its_base_differ(pair: Path, tmp_path: Path) -> None:
    """Adapter and dropout are off in the teacher's forward and on in the student's."""
    keys = {"model_config": {"attention_dropout": 0.5}, **validation_set(pair)}
    trainer = run_training(own_base(pair, **keys), tmp_path / "out", disturb)
    assert losses(trainer)[0] > 0.01
    ids = torch.arange(40, 60)[None]
    student, teacher = trainer.distiller.student, trainer.distiller.teacher
    plain = AutoModelForCausalLM.from_pretrained(pair / "student")
    trainer.model.train()  # the dropout of its modules is the student's alone
    with torch.no_grad():
        base = teacher.logits(teacher.hidden_states(ids))
        assert torch.equal(base, plain(ids).logits)
        adapted = student.logits(student.hidden_states(ids))
        assert not torch.allclose(adapted, base, atol=1e-2)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_without_an_adapter_there_is_no_base_to_go_back_to(pair: Path, tmp_path: Path) -> None:
    config = base_config(pair)
    config["distillation"]["teacher"] = {"student_base": True}
    with pytest.raises(ConfigConflictError, match="there is no adapter"):
        run_training(config, tmp_path / "out")


def test_a_teachers_adapter_teaches(pair: Path, tmp_path: Path) -> None:
    """As the same model merged by hand, whose rounding is a little different."""
    base = AutoModelForCausalLM.from_pretrained(pair / "teacher")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(pair / "teacher", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    keys = {"method": "supervised_kd", "optimizer": "sgd", "learning_rate": 0.05}
    teacher = {"base_model": str(pair / "teacher"), "adapter": str(tmp_path / "adapter")}
    with_adapter = run_training(base_config(pair, **keys, teacher=teacher), tmp_path / "a")
    merged = base_config(pair, **keys, teacher={"base_model": str(tmp_path / "merged")})
    expected = run_training(merged, tmp_path / "b")
    plain = run_training(base_config(pair, **keys), tmp_path / "c")
    assert losses(with_adapter) == pytest.approx(losses(expected), abs=1e-4)
    assert abs(losses(with_adapter)[0] - losses(plain)[0]) > 0.05


@pytest.mark.parametrize("method", ["skd", "mixed_skd"])
def test_an_offloaded_teacher_is_asked_at_hand_only(
    pair: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forward of its decoder within `at_hand`; the run is the one without offloading."""
    state = {"at hand": False, "comings": 0, "forwards": 0}
    at_hand = Offloaded.at_hand

    @contextmanager
    def watched(self: Offloaded) -> Any:
        state["comings"] += 1
        with at_hand(self):
            state["at hand"] = True
            yield
            state["at hand"] = False

    def watch(trainer: DistillationTrainer) -> None:
        def check(*_: Any) -> None:
            assert state["at hand"]
            state["forwards"] += 1

        trainer.distiller.teacher.decoder.register_forward_pre_hook(check)

    monkeypatch.setattr(Offloaded, "at_hand", watched)
    config = base_config(pair, method=method, teacher={"offload": True}, max_steps=2)
    offloaded = run_training(config, tmp_path / "offloaded", watch)
    assert state["forwards"] > state["comings"] >= 2
    expected = run_training(base_config(pair, method=method, max_steps=2), tmp_path / "plain")
    # Copies lie at other addresses than a mapped checkpoint, and kernels round by alignment.
    assert largest_difference(weights(offloaded), weights(expected)) < 1e-4
