"""On a CUDA device: graphs change no token, a round waits once, memory is as predicted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.graphs import CudaCapture
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import AUTO, Prompts, Rollout, SamplingParams
from tests.rollout.tiny import STOP_IDS, random_prompts, tiny_model
from tests.training.harness import base_config, run_training, save_model, save_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [1, 40, 7, 2, 23, 33, 12, 17]


def roll_out(
    family: str, graphs: bool, num_draft_tokens: Any = 5, max_new: int = 24, **options: Any
) -> tuple[list[Rollout], list[CausalLM]]:
    """Two rollouts of one engine, and the views of its models."""
    models = (
        tiny_model(family, seed=1, sharpness=5.0),
        tiny_model(family, seed=2, hidden_size=48, num_layers=3, sharpness=5.0),
    )
    new_capture = CudaCapture if graphs else None
    lms = [CausalLM(model.cuda(), new_capture=new_capture) for model in models]
    prompts = Prompts(
        tuple(torch.tensor(ids, device="cuda") for ids in random_prompts(5, LENGTHS)),
        row_streams(3, 1, torch.arange(len(LENGTHS))),
        torch.full((len(LENGTHS),), max_new),
    )
    params = SamplingParams(num_draft_tokens, 220, 0.5, 0.5, 0.2, 1.0, STOP_IDS)
    engine = RolloutEngine(*lms, **options)
    with torch.no_grad():
        return [engine.interleave(prompts, params) for _ in range(2)], lms


@pytest.mark.parametrize("num_draft_tokens", [2, 5, AUTO])
@pytest.mark.parametrize("family", ["llama", "qwen2_window", "gemma2"])
def test_graphs_and_haste_change_no_token(
    family: str, num_draft_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))
    )
    (plain, _), _ = roll_out(family, graphs=False, patient=True)
    fast, lms = roll_out(family, graphs=True, num_draft_tokens=num_draft_tokens, fixed_shapes=True)
    assert replays and all(lm.graphs for lm in lms)  # captured, and never given up
    for rollout in fast:
        assert torch.equal(plain.completion_ids, rollout.completion_ids)
        assert torch.equal(plain.accepted_mask, rollout.accepted_mask)
        torch.testing.assert_close(
            plain.teacher_hidden, rollout.teacher_hidden, atol=1e-3, rtol=1e-3
        )


def test_a_round_waits_for_the_device_once() -> None:
    """More rounds, as many more waits: what is done per rollout or per row cancels."""

    def waits(max_new: int) -> tuple[int, int]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rollouts, _ = roll_out("llama", False, num_draft_tokens=1, max_new=max_new)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len(caught), sum(rollout.num_rounds for rollout in rollouts)

    (few, short), (many, long) = waits(24), waits(96)
    assert long > short
    assert many - few <= 1.2 * (long - short)


def test_memory_is_about_as_predicted(tmp_path: Path) -> None:
    save_model(tmp_path / "student", seed=0, hidden=512, layers=8)
    save_model(tmp_path / "teacher", seed=1, hidden=512, layers=8)
    save_rows(tmp_path / "train.jsonl", 8)
    trainer = run_training(base_config(tmp_path, method="skd", max_steps=2), tmp_path / "out")
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert 0.5 < line["memory/predicted_gib"] / line["memory/peak_gib"] < 2
