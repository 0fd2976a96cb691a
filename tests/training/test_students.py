"""Students of every kind in training: compiled, in mixed precision, quantised, resized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import (
    SGD,
    base_config,
    largest_difference,
    run_training,
    save_model,
    weights,
)

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def losses(trainer: DistillationTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trainable(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Axolotl's and accelerate's settings of the compiler outlive a run; here they do not."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(suppress_errors=False):
        yield
    AcceleratorState._reset_state()


def test_a_compiled_student_trains_the_same(pair: Path, tmp_path: Path, compiler: None) -> None:
    """States come through the compiled forward, which is not compiled anew for every step."""
    keys = {**SGD, "max_steps": 10, "num_epochs": 9}
    plain = run_training(base_config(pair, **keys), tmp_path / "plain")
    assert not counters["stats"]
    keys |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = run_training(base_config(pair, **keys), tmp_path / "compiled")
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert largest_difference(weights(compiled), weights(plain)) < 2e-6


def linear_changes(trainer: DistillationTrainer, start: dict[str, torch.Tensor]) -> float:
    """Share of the numbers in linear layers that a run has changed."""
    pairs = [(start[n], p) for n, p in trainable(trainer).items() if "_proj" in n]
    changed = sum(int((old.float() != new.float()).sum()) for old, new in pairs)
    return changed / sum(new.numel() for _, new in pairs)


@pytest.mark.parametrize("masters", [False, True])
def test_small_updates_reach_masters_and_are_lost_without(
    pair: Path, tmp_path: Path, masters: bool
) -> None:
    start: dict[str, torch.Tensor] = {}
    seen: set[torch.dtype] = set()

    def watch(trainer: DistillationTrainer) -> None:
        start.update(trainable(trainer))
        layer = trainer.distiller.student.model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))

    config = base_config(pair, max_steps=2, bf16=True, learning_rate=1e-5)
    config["distillation"]["fp32_master_weights"] = masters
    trainer = run_training(config, tmp_path / "out", watch)
    held = {p.dtype for n, p in start.items() if "_proj" in n}
    assert held == {torch.float32 if masters else torch.bfloat16}
    assert seen == {torch.bfloat16}  # rollout and training alike
    changes = linear_changes(trainer, start)
    assert changes > 0.95 if masters else changes < 0.35
    assert type(trainer.distiller.student) is CausalLM
    if masters:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert saved.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


def test_masters_train_as_float32_does_but_for_rounding(pair: Path, tmp_path: Path) -> None:
    """The data set's completions, which no rounding changes: the losses of a float32 run."""
    keys: dict[str, Any] = {"method": "supervised_kd", "max_steps": 4}
    exact = run_training(base_config(pair, **keys), tmp_path / "exact")
    config = base_config(pair, **keys, bf16=True, teacher={"dtype": "float32"})
    config["distillation"]["fp32_master_weights"] = True
    mixed = run_training(config, tmp_path / "mixed")
    assert losses(mixed) == pytest.approx(losses(exact), rel=0.03)
    assert losses(mixed)[-1] < 0.95 * losses(mixed)[0]


def test_every_part_of_a_quantised_students_adapter_learns(pair: Path, tmp_path: Path) -> None:
    """Also below 4-bit layers, through which the gradient has to come after a rollout."""
    start: dict[str, torch.Tensor] = {}
    config = base_config(pair, **{**LORA, "adapter": "qlora"}, load_in_4bit=True, max_steps=2)
    trainer = run_training(config, tmp_path, lambda trainer: start.update(trainable(trainer)))
    base = trainer.distiller.student.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert type(base).__name__ == "Params4bit"
    end = trainable(trainer)
    assert end and all("lora_" in name for name in end)
    assert [name for name in end if torch.equal(end[name], start[name])] == []


def test_dora_trains_its_magnitudes_too(pair: Path, tmp_path: Path) -> None:
    start: dict[str, torch.Tensor] = {}
    config = base_config(pair, **LORA, peft_use_dora=True, max_steps=2)
    trainer = run_training(config, tmp_path, lambda trainer: start.update(trainable(trainer)))
    end = trainable(trainer)
    assert any("magnitude" in name for name in end)
    assert [name for name in end if torch.equal(end[name], start[name])] == []


def test_a_rollout_keeps_its_cache_under_checkpointing(pair: Path, tmp_path: Path) -> None:
    fed: list[tuple[int, bool, bool]] = []  # (tokens, cache, gradient)

    def watch(trainer: DistillationTrainer) -> None:
        def see(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
            cached = inputs.get("past_key_values") is not None
            fed.append((inputs["input_ids"].shape[1], cached, torch.is_grad_enabled()))

        trainer.distiller.student.decoder.register_forward_pre_hook(see, with_kwargs=True)

    trainer = run_training(
        base_config(pair, gradient_checkpointing=True, max_steps=2), tmp_path, watch
    )
    assert trainer.model.is_gradient_checkpointing
    sampling = [(tokens, cached) for tokens, cached, gradient in fed if not gradient]
    assert all(cached for _, cached in sampling)
    assert sum(tokens == 1 for tokens, _ in sampling) > 10
    assert [cached for _, cached, gradient in fed if gradient] == [False, False]


def test_a_student_with_new_tokens_learns_them_from_a_teacher_that_knows_them(
    pair: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("student", "train.jsonl"):
        (folder / name).symlink_to(pair / name)
    save_model(folder / "teacher", seed=1, hidden=48)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    old = teacher.config.vocab_size
    teacher.resize_token_embeddings(len(tokenizer))
    teacher.save_pretrained(folder / "teacher")

    start: dict[str, torch.Tensor] = {}
    config = base_config(folder, tokens=["<one>", "<two>"], max_steps=2)
    trainer = run_training(config, tmp_path, lambda trainer: start.update(trainable(trainer)))
    (name,) = [name for name in start if "embed_tokens" in name]
    assert trainer.distiller.student.vocab_size == len(tokenizer) == old + 2
    moved = (trainable(trainer)[name] - start[name]).abs().amax(dim=1)
    assert bool((moved[old:] > 0).all())  # their probabilities are taught everywhere
