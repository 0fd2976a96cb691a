"""On a CUDA device: two steps in each precision that users train in. Skipped where there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.harness import base_config, run_training, save_model, save_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "tf32": {"tf32": True},
    "bf16": {"bf16": True},
    "bf16, 4-bit teacher": {"bf16": True, "teacher": {"load_in_4bit": True, "dtype": "bfloat16"}},
    "bf16, 8-bit teacher": {"bf16": True, "teacher": {"load_in_8bit": True}},
    "float32 student, bf16 teacher": {"teacher": {"dtype": "bfloat16"}},
    "teacher on the CPU": {"teacher": {"device": "cpu"}},
    "offloaded teacher": {"teacher": {"offload": True}},
    "bf16, float32 masters": {"bf16": True, "masters": True},
    "fp16, float32 masters": {"fp16": True, "masters": True},
}


@pytest.mark.parametrize("method", ["skd", "on_policy_kd", "gkd"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_two_steps(tmp_path: Path, name: str, method: str) -> None:
    save_model(tmp_path / "student", seed=0, hidden=64, tied=True)
    save_model(tmp_path / "teacher", seed=1, hidden=64, layers=3)
    save_rows(tmp_path / "train.jsonl", 8)
    keys = dict(PRECISIONS[name])
    masters = keys.pop("masters", False)
    config = base_config(tmp_path, method=method, max_steps=2, **keys)
    config["distillation"]["fp32_master_weights"] = masters
    trainer = run_training(config, tmp_path / "out")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
