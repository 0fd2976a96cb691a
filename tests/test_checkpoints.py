"""Which checkpoint is whole, and which one a run goes on from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.train import determine_last_checkpoint
from safetensors.torch import save_file

from axolotl_skd.checkpoints import (
    CheckpointsDifferError,
    IncompleteCheckpointError,
    check_ranks_agree,
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
    part = {"model.safetensors": "weights", "optimizer.pt": "optimizer"}.get(name, name)
    assert missing(folder) == [f"no {part}"]


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


DEEPSPEED = ("global_step1/mp_rank_00_model_states.pt", "global_step1/optim_states.pt", "latest")
FSDP = ("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt")
FSDP_FULL = ("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt")
ADAPTERS = ("teacher/adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


@pytest.mark.parametrize("names", [DEEPSPEED, FSDP, FSDP_FULL, ADAPTERS])
def test_the_forms_of_other_engines_are_whole_too(tmp_path: Path, names: tuple[str, ...]) -> None:
    like = save(tmp_path / "like", 1)
    folder = tmp_path / "checkpoint-1"
    for name in (*names, "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".json": "trainer_state.json", ".safetensors": "model.safetensors"}
        shutil.copy(like / kind.get(path.suffix, "optimizer.pt"), path)
    assert missing(folder) == []
    (folder / "trainer_state.json").rename(folder / "aside")
    assert missing(folder) == ["no trainer_state.json"]
    (folder / "aside").rename(folder / "trainer_state.json")
    if not names[0].endswith(".distcp"):  # of which only its own engine knows the end
        cut(folder / names[0], 0.5)
        assert missing(folder) == [f"{names[0]} ends too early"]
    shutil.rmtree(folder / Path(names[0]).parts[0]) if "/" in names[0] else None
    assert "/" not in names[0] or "no weights" in missing(folder)


def test_a_folder_that_is_nobodys_part_makes_nothing_broken_or_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "runs").mkdir()
    assert missing(folder) == []
    (folder / "optimizer.pt").unlink()
    assert missing(folder) == ["no optimizer"]


def test_weights_alone_are_enough_where_nothing_else_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, 1)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    cfg = {"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}
    choose_checkpoint(weights_alone := {**cfg, "save_only_model": True})
    assert weights_alone["resume_from_checkpoint"] == str(folder)
    assert "optimizer, learning-rate schedule and random numbers begin anew" in caplog.text
    choose_checkpoint({**weights_alone})  # by name
    choose_checkpoint(cfg)
    assert cfg["auto_resume_from_checkpoints"] is False
    assert "no optimizer, no scheduler.pt, no rng_state.pth" in caplog.text
    (folder / "trainer_state.json").unlink()
    assert missing(folder, only_model=True) == ["no trainer_state.json"]


def test_half_written_ones_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step)
    cut(tmp_path / "checkpoint-2" / "optimizer.pt", 0.5)  # an older one is nobody's business
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    cut(tmp_path / "checkpoint-11" / "optimizer.pt", 0.5)
    cfg = {"output_dir": str(tmp_path), "auto_resume_from_checkpoints": True}
    with caplog.at_level(logging.INFO, "axolotl_skd.checkpoints"):
        choose_checkpoint(cfg)
    whole = str(tmp_path / "checkpoint-9")
    assert cfg["resume_from_checkpoint"] == whole
    first, second, last = (record.getMessage() for record in caplog.records)
    assert "checkpoint-11 is half-written (optimizer.pt ends too early)" in first
    assert f"passed over, going on from {whole}" in first
    assert "checkpoint-10 is half-written (no trainer_state.json)" in second
    assert last == f"going on from {whole}"
    assert len(checkpoints(tmp_path)) == 4  # nothing is removed


def test_without_a_whole_one_training_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Axolotl itself is told so too: it would take the folder."""
    cut(save(tmp_path, 1) / "model.safetensors", 0.5)
    cfg = DictDefault(output_dir=str(tmp_path), auto_resume_from_checkpoints=True)
    assert determine_last_checkpoint(DictDefault(cfg)) is not None
    with caplog.at_level(logging.WARNING, "axolotl_skd.checkpoints"):
        choose_checkpoint(cfg)
    assert determine_last_checkpoint(cfg) is None
    assert "training starts anew" in caplog.text


class Ranks:
    """An accelerator of three processes of which the others go on from `others`."""

    device = "cpu"

    def __init__(self, *others: int) -> None:
        self._others = others

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, torch.tensor(self._others)])


def test_ranks_go_on_from_the_same_step_or_not_at_all(tmp_path: Path) -> None:
    cfg = {"output_dir": "out", "resume_from_checkpoint": "out/checkpoint-4"}
    check_ranks_agree(cfg, Ranks(4, 4))
    check_ranks_agree({}, Ranks(0, 0))
    with pytest.raises(CheckpointsDifferError, match=r"from steps \[4, 4, 3\]"):
        check_ranks_agree(cfg, Ranks(4, 3))
    with pytest.raises(CheckpointsDifferError, match=r"from steps \[0, 0, 3\]"):
        check_ranks_agree({}, Ranks(0, 3))


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
    with pytest.raises(IncompleteCheckpointError, match="no optimizer") as error:
        choose_checkpoint(cfg)
    assert f"The last whole one is {whole}" in str(error.value)
    with pytest.raises(IncompleteCheckpointError, match="there is no such folder"):
        choose_checkpoint({**cfg, "resume_from_checkpoint": str(tmp_path / "nowhere")})
    choose_checkpoint({**cfg, "resume_from_checkpoint": str(whole)})
    assert broken.exists()
