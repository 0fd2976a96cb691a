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


def roll_out(family: str, graphs: bool, num_draft_tokens: Any = 5, **options: Any) -> Rollout:
    models = (
        tiny_model(family, seed=1, sharpness=5.0),
        tiny_model(family, seed=2, hidden_size=48, num_layers=3, sharpness=5.0),
    )
    capture = CudaCapture() if graphs else None
    lms = (CausalLM(model.cuda(), capture=capture) for model in models)
    prompts = Prompts(
        tuple(torch.tensor(ids, device="cuda") for ids in random_prompts(5, LENGTHS)),
        row_streams(3, 1, torch.arange(len(LENGTHS))),
        torch.full((len(LENGTHS),), 24),
    )
    params = SamplingParams(num_draft_tokens, 220, 0.5, 0.5, 0.2, 1.0, STOP_IDS)
    with torch.no_grad():
        return RolloutEngine(*lms, **options).interleave(prompts, params)


@pytest.mark.parametrize("num_draft_tokens", [2, 5, AUTO])
@pytest.mark.parametrize("family", ["llama", "qwen2_window", "gemma2"])
def test_graphs_and_haste_change_no_token(family: str, num_draft_tokens: Any) -> None:
    plain = roll_out(family, graphs=False, patient=True)
    fast = roll_out(family, graphs=True, num_draft_tokens=num_draft_tokens, fixed_shapes=True)
    assert torch.equal(plain.completion_ids, fast.completion_ids)
    assert torch.equal(plain.accepted_mask, fast.accepted_mask)
    torch.testing.assert_close(plain.teacher_hidden, fast.teacher_hidden, atol=1e-3, rtol=1e-3)


def test_a_round_waits_for_the_device_once() -> None:
    """Beyond it only what happens per rollout, or per row that comes or goes."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            rollout = roll_out("llama", graphs=False, num_draft_tokens=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    per_row = 12 * len(LENGTHS)
    assert rollout.num_rounds <= len(waits) <= rollout.num_rounds + per_row


def test_memory_is_about_as_predicted(tmp_path: Path) -> None:
    save_model(tmp_path / "student", seed=0, hidden=512, layers=8)
    save_model(tmp_path / "teacher", seed=1, hidden=512, layers=8)
    save_rows(tmp_path / "train.jsonl", 8)
    trainer = run_training(base_config(tmp_path, method="skd", max_steps=2), tmp_path / "out")
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert 0.5 < line["memory/predicted_gib"] / line["memory/peak_gib"] < 2
