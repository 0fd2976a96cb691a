"""`seqkd` inside training: the teacher's own sequences, written once, read ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import base_config, largest_difference, run_training, weights


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts per call of the engine's teacher sampler."""
    calls: list[int] = []
    sample = RolloutEngine.sample_teacher

    def watched(self: RolloutEngine, prompts: Any, params: Any) -> Any:
        calls.append(len(prompts.ids))
        return sample(self, prompts, params)

    monkeypatch.setattr(RolloutEngine, "sample_teacher", watched)
    return calls


def config(pair: Path, tmp_path: Path, seqkd: str = "sampled", **keys: Any) -> dict[str, Any]:
    result = base_config(pair, **{"method": "seqkd", "max_steps": 4, **keys})
    result["dataset_prepared_path"] = str(tmp_path / "prepared")
    result["distillation"]["seqkd"] = {"decoding": seqkd}
    return result


def completions(trainer: DistillationTrainer, seen: dict[int, set[tuple[int, ...]]]) -> None:
    """Note what each sample is trained on."""
    source = trainer.distiller.source
    complete = source.complete

    def watched(batches: Any, *args: Any) -> Any:
        completed, metrics = complete(batches, *args)
        for batch in completed:
            for row, sample in enumerate(batch["sample_ids"].tolist()):
                ids = batch["input_ids"][row][: int(batch["attention_mask"][row].sum())]
                seen.setdefault(sample, set()).add(
                    (int(batch["prompt_lengths"][row]), *ids.tolist())
                )
        return completed, metrics

    source.complete = watched


@pytest.mark.parametrize("num_rollouts", [1, 2])
def test_sequences_are_written_once_and_read_again(
    pair: Path, tmp_path: Path, sampled: list[int], num_rollouts: int
) -> None:
    """10 rows over 4 epochs of 4: the same completions each time, the teacher asked once and freed."""
    settings = config(pair, tmp_path, rollout={"num_rollouts": num_rollouts})
    seen: dict[int, set[tuple[int, ...]]] = {}
    first = run_training(settings, tmp_path / "first", lambda trainer: completions(trainer, seen))
    assert sum(sampled) == 10 * num_rollouts
    assert len(seen) == 10
    # Two samples of a sharp teacher may be the same, but not all of them.
    assert max(len(rows) for rows in seen.values()) == num_rollouts
    assert first.distiller.teacher is None
    sampled.clear()
    second = run_training(settings, tmp_path / "second")
    assert sampled == []
    assert largest_difference(weights(first), weights(second)) == 0


def test_another_seed_or_setting_is_written_anew(
    pair: Path, tmp_path: Path, sampled: list[int]
) -> None:
    settings = config(pair, tmp_path, max_steps=1)
    run_training(settings, tmp_path / "first")
    for key, value in (("seed", 8), ("teacher_temperature", 0.9)):
        block = settings["distillation"]
        (block if key == "seed" else block["rollout"])[key] = value
        sampled.clear()
        run_training(settings, tmp_path / key)
        assert sum(sampled) == 10


def test_greedy_sequences_are_the_teachers_most_likely_tokens(pair: Path, tmp_path: Path) -> None:
    seen: dict[int, set[tuple[int, ...]]] = {}
    trainer = run_training(
        config(pair, tmp_path, "greedy"), tmp_path, lambda trainer: completions(trainer, seen)
    )
    stops = set(base_config(pair)["distillation"]["rollout"]["stop_token_ids"])
    stops.add(trainer.processing_class.eos_token_id)
    teacher = AutoModelForCausalLM.from_pretrained(pair / "teacher").eval()
    for ((length, *ids),) in seen.values():
        with torch.no_grad():
            best = teacher(torch.tensor([ids])).logits[0].argmax(-1)[length - 1 : -1]
        assert ids[length:] == best.tolist()
        assert len(ids) - length <= 12 and not stops & set(ids[length:-1])
        assert len(ids) - length == 12 or ids[-1] in stops
