"""`axolotl train CONFIG` from the outside: the embedded example, shortened, twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from axolotl_skd.resources import resource_path

ROOT = resource_path("example_configs").parent


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def axolotl_train(config: dict, path: Path) -> subprocess.CompletedProcess[str]:
    """Run it in the checkout, since the example's paths are relative to it."""
    path.write_text(yaml.safe_dump(config))
    binaries = Path(sys.executable).parent  # `axolotl train` looks for `accelerate` on the PATH
    return subprocess.run(
        [str(binaries / "axolotl"), "train", str(path)],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )


@pytest.fixture
def config(tmp_path: Path) -> dict:
    """`skd_tiny.yml`, three steps of it, 8 problems at either end."""
    text = (resource_path("example_configs") / "skd_tiny.yml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    config["distillation"]["eval"]["limit"] = 8
    return {
        **config,
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "max_steps": 3,
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "micro_batch_size": 4,
    }


def test_the_embedded_example_from_start_to_end_and_again(config: dict, tmp_path: Path) -> None:
    config["use_tensorboard"] = True
    first = axolotl_train(config, tmp_path / "config.yml")
    assert first.returncode == 0, first.stdout[-6000:]
    assert "distillation, 3 steps: method: skd" in first.stdout
    for part in (
        "180,672 trainable",
        "853,120 parameters (frozen",
        "vocabulary: 512",
        "<|im_end|>",
    ):
        assert part in first.stdout
    assert "'skd/acceptance_rate'" in first.stdout
    assert "before" in first.stdout.rsplit("task ", 1)[1].splitlines()[0]
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    for stage in ("start", "end"):
        assert 0 <= results[stage]["skd_tiny_arithmetic"]["acc"] <= 1
    assert (tmp_path / "out" / "model.safetensors").exists()

    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tracked = [(e.step, e.value) for e in events.Scalars("eval/skd_tiny_arithmetic/acc")]
    scores = [results[stage]["skd_tiny_arithmetic"]["acc"] for stage in ("start", "end")]
    assert tracked == [(0, scores[0]), (3, scores[1])]

    config["distillation"].pop("eval")
    second = axolotl_train(config, tmp_path / "config.yml")
    assert second.returncode == 0, second.stdout[-6000:]
    assert "Generating train split" not in second.stdout
    assert "Tokenizing Prompts" not in second.stdout


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("seqkd", {}, ["teacher sequences: 100%", "teacher sequences: sampled"]),
        ("gkd", LORA, ["loss: jsd of beta 0.5", "'rollout/share'"]),
        ("speckd", {}, ["gated by top_k of 5", "'gate/token_acceptance_rate'"]),
    ],
)
def test_other_methods_from_their_own_configs(
    method: str, keys: dict, said: list[str], tmp_path: Path
) -> None:
    path = resource_path("example_configs") / f"{method}_tiny.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    del config["distillation"]["eval"]
    config["datasets"][0]["split"] = "train[:24]"
    config["test_datasets"][0]["split"] = "train[:8]"
    shortened = {
        **{
            "output_dir": str(tmp_path / "out"),
            "dataset_prepared_path": str(tmp_path / "prepared"),
        },
        **{"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1},
        "micro_batch_size": 4,
    }
    run = axolotl_train({**config, **shortened, **keys}, tmp_path / "config.yml")
    assert run.returncode == 0, run.stdout[-6000:]
    assert f"distillation, 2 steps: method: {method}" in run.stdout
    for part in [*said, "'grad_norm'", "'eval_loss'"]:
        assert part in run.stdout
    weights = "adapter_model.safetensors" if keys else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


def test_a_mistyped_key_stops_with_the_nearest_valid_one(config: dict, tmp_path: Path) -> None:
    config["distillation"]["rollout"]["teacher_topk"] = 3
    run = axolotl_train(config, tmp_path / "config.yml")
    assert run.returncode != 0
    assert "unknown key 'teacher_topk'. Did you mean 'teacher_top_k'?" in run.stdout
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_missing_teacher_stops_before_any_model_is_loaded(config: dict, tmp_path: Path) -> None:
    config["distillation"]["teacher"]["base_model"] = str(tmp_path / "nowhere")
    run = axolotl_train(config, tmp_path / "config.yml")
    assert run.returncode != 0
    assert "distillation.teacher.base_model" in run.stdout
    assert "Loading weights" not in run.stdout
