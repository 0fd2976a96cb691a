"""ZeRO-3 and FSDP2 on one CUDA device, through Axolotl: as without. Skipped where there is none."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.harness import SGD, base_config, largest_difference, save_model, save_rows
from tests.training.test_ranks import assert_same_rollouts, logged, results, succeed
from tests.training.test_zero import ZERO_3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FSDP_2: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "offload_params": False,
    },
}
without_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.mark.parametrize("gather", ["whole", "layers"])
@pytest.mark.parametrize(
    "engine",
    [pytest.param({"deepspeed": ZERO_3}, marks=without_deepspeed, id="ZeRO-3"), FSDP_2],
    ids=["ZeRO-3", "FSDP2"],
)
def test_an_engine_changes_nothing(tmp_path: Path, engine: dict[str, Any], gather: str) -> None:
    save_model(tmp_path / "student", seed=0, tied=True)
    save_model(tmp_path / "teacher", seed=1, hidden=48)
    save_rows(tmp_path / "train.jsonl", 12)
    plain = base_config(tmp_path, **SGD, method="mixed_skd", max_steps=2)
    block = plain["distillation"]
    spread = {**block, "teacher": {**block["teacher"], "gather": gather}}
    configs = {"plain": plain, "engine": {**plain, **engine, "distillation": spread}}
    for name, config in configs.items():  # each in a process of its own: an engine stays with it
        succeed(1, {name: config}, tmp_path / name)
    (expected,), (got,) = (results(tmp_path / name, name, 1) for name in configs)
    assert_same_rollouts(expected, [got])
    assert logged(got, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-4)
    assert largest_difference(expected["weights"], got["weights"]) < 1e-4
