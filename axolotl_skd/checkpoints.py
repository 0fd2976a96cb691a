"""Which checkpoint a run goes on from: the last whole one.

A checkpoint is whole if a run that goes on from it has all that the interrupted one had:

- `trainer_state.json`, which is written after all else (`DistillationCore` sees to that on all ranks);
- weights, optimizer, schedule and random states, in the form of any engine (one file, several with an
  index, PEFT's folders of adapters, DeepSpeed's `global_step*`, FSDP's `pytorch_model_fsdp*` and
  `optimizer*`); with `save_only_model: true` the weights alone;
- and no file ends too early: a safetensors file knows its length, the ZIP archives of `torch.save` have
  their directory at the end.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from axolotl.utils.logging import get_logger
from safetensors import SafetensorError, safe_open

LOG = get_logger(__name__)

STATE_FILE = "trainer_state.json"
# What a checkpoint needs, and the names under which engines keep it.
_WEIGHTS = {
    "weights": (
        "*model.safetensors",
        "*model.bin",
        "*model.*.index.json",
        "*/adapter_model.*",
        "pytorch_model_fsdp*",
        "global_step*",
    )
}
_REST = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


class IncompleteCheckpointError(ValueError):
    """A checkpoint that was asked for by name and is not whole."""


class CheckpointsDifferError(RuntimeError):
    """Ranks that would go on from different steps."""


def choose_checkpoint(cfg: MutableMapping[str, Any]) -> None:
    """Settle `resume_from_checkpoint` before anybody reads it.

    With `auto_resume_from_checkpoints` Axolotl alone takes the newest folder, whatever is in it. Here
    half-written ones are named and passed over. They are left where they are, and written anew when
    training gets to their step.

    Args:
        cfg: the Axolotl config; changed in place.

    Raises:
        IncompleteCheckpointError: `resume_from_checkpoint` names one that is not whole.
    """
    only_model = bool(cfg.get("save_only_model"))
    named = cfg.get("resume_from_checkpoint")
    if named:
        _refuse_incomplete(Path(named), Path(cfg["output_dir"]), only_model)
    elif cfg.get("auto_resume_from_checkpoints"):
        found = last_whole_checkpoint(Path(cfg["output_dir"]), only_model)
        if found is None:
            cfg["auto_resume_from_checkpoints"] = False
        else:
            LOG.info("going on from %s", found)
            cfg["resume_from_checkpoint"] = str(found)
    chosen = cfg.get("resume_from_checkpoint")
    if chosen and (lacks := missing(Path(chosen))):
        LOG.warning(
            "%s was saved with save_only_model (%s): optimizer, learning-rate schedule and random "
            "numbers begin anew, so the result is not that of an uninterrupted run.",
            chosen,
            ", ".join(lacks),
        )


def last_whole_checkpoint(output_dir: Path, only_model: bool = False) -> Path | None:
    """The last one of a run; each incomplete one after it is said.

    Args:
        output_dir: of the run.
        only_model: are weights enough?
    """
    incomplete, whole = [], None
    for folder in reversed(checkpoints(output_dir)):
        lacks = missing(folder, only_model)
        if not lacks:
            whole = folder
            break
        incomplete.append((folder, lacks))
    instead = "training starts anew" if whole is None else f"going on from {whole}"
    for folder, lacks in incomplete:
        LOG.warning("%s is half-written (%s): passed over, %s.", folder, ", ".join(lacks), instead)
    return whole


def check_ranks_agree(cfg: MutableMapping[str, Any], accelerator: Accelerator) -> None:
    """Refuse ranks that chose different steps, each in the folders that it sees.

    Raises:
        CheckpointsDifferError: on all ranks.
    """
    digits = Path(cfg.get("resume_from_checkpoint") or "").name.rpartition("-")[2]
    step = torch.tensor([int(digits) if digits.isdigit() else 0], device=accelerator.device)
    steps = accelerator.gather(step).tolist()
    if len(set(steps)) > 1:
        raise CheckpointsDifferError(
            f"the ranks would go on from steps {steps} (0: from the start), since they do not see the "
            f"same whole checkpoints in {cfg.get('output_dir')}. Put output_dir where all ranks see "
            "it, or name a checkpoint that is whole on all of them: resume_from_checkpoint."
        )


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, ascending by their steps."""
    folders = output_dir.glob("checkpoint-*")
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in folders}
    found = [folder for folder, step in steps.items() if step.isdigit() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(steps[folder]))


def missing(folder: Path, only_model: bool = False) -> list[str]:
    """What keeps a checkpoint from being whole, for people; empty if it is."""
    return list(_missing(folder, only_model)) if folder.is_dir() else ["there is no such folder"]


def _missing(folder: Path, only_model: bool) -> Iterator[str]:
    parts = {STATE_FILE: (STATE_FILE,), **_WEIGHTS, **({} if only_model else _REST)}
    for part, names in parts.items():
        if not any(any(folder.glob(name)) for name in names):
            yield f"no {part}"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if not _ends(path):
            yield f"{name} ends too early"
        elif name.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_bytes()).get("weight_map", {}).values()))
            yield from (f"no {shard}" for shard in shards if not (path.parent / shard).exists())


def _ends(path: Path) -> bool:
    """Is a file there to its end, as far as its format can tell? Reads no tensors."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with open(path, "rb") as file:
                start = file.read(2)
            return bool(start) and (start != b"PK" or zipfile.is_zipfile(path))
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _refuse_incomplete(folder: Path, output_dir: Path, only_model: bool) -> None:
    lacks = missing(folder, only_model)
    if not lacks:
        return
    others = [other for other in checkpoints(output_dir) if other != folder]
    whole = [other for other in others if not missing(other, only_model)]
    remedy = f"The last whole one is {whole[-1]}: name that." if whole else "No other is whole."
    raise IncompleteCheckpointError(
        f"resume_from_checkpoint: {folder} is not whole ({', '.join(lacks)}), so training could not "
        f"go on as if nothing had happened. {remedy} (To start a new run from its weights alone, make "
        "it base_model.)"
    )
