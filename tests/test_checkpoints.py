"""Which checkpoint is whole, and which one a run goes on from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from axolotl_skd.checkpoints import (
    IncompleteCheckpointError,
    checkpoints,
    choose_checkpoint,
    missing,
)

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def save(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(50)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(50)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_ends_too_early_is_named(tmp_path: Path, name: str, share: float) -> None:
    folder = save(tmp_path, 1)
    assert missing(folder) == []
    cut(folder / name, share)
    assert missing(folder) == [f"{name} ends too early"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lacks_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    assert missing(folder) == ["no weights" if name == FILES[0] else f"no {name}"]


def test_every_rank_has_its_generator(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert missing(folder) == []
    cut(folder / "rng_state_1.pth", 0.5)
    assert missing(folder) == ["rng_state_1.pth ends too early"]


def test_weights_in_several_files_or_an_adapter(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder / "model-1.safetensors")
    shutil.copy(weights, folder / "model-2.safetensors")
    weights.rename(folder / "adapter_model.safetensors")
    assert missing(folder) == []
    (folder / "adapter_model.safetensors").unlink()
    assert missing(folder) == ["no weights"]  # parts, but nobody knows of how many
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing(folder) == []
    cut(folder / "model-2.safetensors", 0.9)
    assert missing(folder) == ["model-2.safetensors ends too early"]


def test_sharded_training_is_judged_by_its_last_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "global_step1").mkdir()
    (folder / "optimizer.pt").unlink()
    assert missing(folder) == []
    (folder / "trainer_state.json").unlink()
    assert missing(folder) == ["no trainer_state.json"]


def test_half_written_ones_are_passed_over_and_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step)
    cut(tmp_path / "checkpoint-2" / "optimizer.pt", 0.5)  # an older one is nobody's business
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    cut(tmp_path / "checkpoint-11" / "optimizer.pt", 0.5)
    (tmp_path / "incomplete-checkpoint-11").mkdir()
    cfg = {"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}
    with caplog.at_level(logging.INFO, "axolotl_skd.checkpoints"):
        choose_checkpoint(cfg)
    whole = str(tmp_path / "checkpoint-9")
    assert cfg["resume_from_checkpoint"] == whole
    first, second, last = (record.getMessage() for record in caplog.records)
    assert "checkpoint-11 is half-written (optimizer.pt ends too early)" in first
    assert f"renamed to incomplete-checkpoint-11.2, going on from {whole}" in first
    assert "checkpoint-10 is half-written (no trainer_state.json)" in second
    assert last == f"going on from {whole}"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9"]
    assert (tmp_path / "incomplete-checkpoint-11.2" / "model.safetensors").exists()


def test_only_the_first_rank_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    folder = save(tmp_path, 3)
    (folder / "optimizer.pt").unlink()
    save(tmp_path, 2)
    cfg = {"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}
    choose_checkpoint(cfg)
    assert cfg["resume_from_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert folder.exists()


def test_without_a_whole_one_training_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut(save(tmp_path, 1) / "model.safetensors", 0.5)
    cfg = {"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}
    with caplog.at_level(logging.WARNING, "axolotl_skd.checkpoints"):
        choose_checkpoint(cfg)
    assert "resume_from_checkpoint" not in cfg and not checkpoints(tmp_path)
    assert "training starts anew" in caplog.text


def test_nothing_is_touched_unless_asked(tmp_path: Path) -> None:
    cut(save(tmp_path, 1) / "model.safetensors", 0.5)
    cfg = {"output_dir": str(tmp_path)}
    choose_checkpoint(cfg)
    assert cfg == {"output_dir": str(tmp_path)} and len(checkpoints(tmp_path)) == 1


def test_a_named_checkpoint_must_be_whole(tmp_path: Path) -> None:
    broken = save(tmp_path, 3)
    (broken / "optimizer.pt").unlink()
    whole = save(tmp_path, 2)
    cfg = {"output_dir": str(tmp_path), "resume_from_checkpoint": str(broken)}
    with pytest.raises(IncompleteCheckpointError, match="no optimizer.pt") as error:
        choose_checkpoint(cfg)
    assert f"The last whole one is {whole}" in str(error.value)
    with pytest.raises(IncompleteCheckpointError, match="there is no such folder"):
        choose_checkpoint({**cfg, "resume_from_checkpoint": str(tmp_path / "nowhere")})
    choose_checkpoint({**cfg, "resume_from_checkpoint": str(whole)})
    assert broken.exists()
