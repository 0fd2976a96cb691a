"""Which checkpoint a run goes on from: the last whole one.

A checkpoint is whole if a run that goes on from it has all that the interrupted one had:

- `trainer_state.json`, which is written last and can be read;
- the weights (`*.safetensors` or `*.bin`, in one file, or all that an index names, or an adapter's);
- `optimizer.pt`, `scheduler.pt` and at least one `rng_state*.pth`;

and none of these files ends too early: safetensors files know their length, the others are ZIP
archives, whose directory comes last. Sharded training (DeepSpeed, FSDP) keeps weights and optimizer in
folders of its own: there `trainer_state.json` decides.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from safetensors import SafetensorError, safe_open

from axolotl_skd.ranks import is_first_rank

LOG = get_logger(__name__)

STATE_FILE = "trainer_state.json"
# Names of the weights, or of the index of their files.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
# What a half-written checkpoint is renamed to. Neither transformers nor Axolotl takes this for one.
_ASIDE = "incomplete-{name}"


class IncompleteCheckpointError(ValueError):
    """A checkpoint that was asked for by name and is not whole."""


def choose_checkpoint(cfg: MutableMapping[str, Any]) -> None:
    """Settle `resume_from_checkpoint` before anybody reads it.

    With `auto_resume_from_checkpoints` alone Axolotl takes the newest folder, whatever is in it. Here
    half-written ones are said, renamed (never deleted) and passed over.

    Args:
        cfg: the Axolotl config; changed in place.

    Raises:
        IncompleteCheckpointError: `resume_from_checkpoint` names one that is not whole.
    """
    named = cfg.get("resume_from_checkpoint")
    if named:
        _refuse_incomplete(Path(named), Path(cfg["output_dir"]))
    elif cfg.get("auto_resume_from_checkpoints"):
        found = last_whole_checkpoint(Path(cfg["output_dir"]))
        if found is not None:
            LOG.info("going on from %s", found)
            cfg["resume_from_checkpoint"] = str(found)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The last one of a run; incomplete ones after it are put aside."""
    incomplete = []
    whole = None
    for folder in reversed(checkpoints(output_dir)):
        lacks = missing(folder)
        if not lacks:
            whole = folder
            break
        incomplete.append((folder, lacks))
    instead = "training starts anew" if whole is None else f"going on from {whole}"
    for folder, lacks in incomplete:
        LOG.warning(
            "%s is half-written (%s): passed over and renamed to %s, %s.",
            folder,
            ", ".join(lacks),
            _put_aside(folder).name,
            instead,
        )
    return whole


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, ascending by their steps."""
    folders = output_dir.glob("checkpoint-*")
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in folders}
    found = [folder for folder, step in steps.items() if step.isdigit() and folder.is_dir()]
    return sorted(found, key=lambda folder: int(steps[folder]))


def missing(folder: Path) -> list[str]:
    """What keeps a checkpoint from being whole, for people; empty if it is."""
    try:
        return list(_missing(folder))
    except (FileNotFoundError, NotADirectoryError):  # or another rank has just put it aside
        return ["there is no such folder"]


def _missing(folder: Path) -> Iterator[str]:
    sharded = any(entry.is_dir() for entry in folder.iterdir())
    if not _readable(folder / STATE_FILE):
        yield _lack(folder / STATE_FILE)
    if sharded:
        return
    weights = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    if not weights:
        yield "no weights"
    for path in weights:
        yield from map(_lack, _broken(path))
    for name in ("optimizer.pt", "scheduler.pt"):
        if not _readable(folder / name):
            yield _lack(folder / name)
    generators = sorted(folder.glob("rng_state*.pth"))
    if not generators:
        yield "no rng_state.pth"
    yield from (_lack(path) for path in generators if not _readable(path))


def _broken(weights: Path) -> list[Path]:
    """Those of a model's files that are not whole: the one, or an index and what it names."""
    if not _readable(weights):
        return [weights]
    if weights.suffix != ".json":
        return []
    shards = sorted(set(json.loads(weights.read_bytes())["weight_map"].values()))
    return [path for path in map(weights.with_name, shards) if not _readable(path)]


def _lack(path: Path) -> str:
    return f"{path.name} ends too early" if path.exists() else f"no {path.name}"


def _readable(path: Path) -> bool:
    """Is a file there to its end? Reads no tensors."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        else:
            with zipfile.ZipFile(path):
                pass
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def _put_aside(folder: Path) -> Path:
    """Rename a folder on the first rank; nobody else's checkpoint is touched by it."""
    aside = folder.with_name(_ASIDE.format(name=folder.name))
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(_ASIDE.format(name=f"{folder.name}.{number}"))
    if is_first_rank():
        os.replace(folder, aside)
    return aside


def _refuse_incomplete(folder: Path, output_dir: Path) -> None:
    lacks = missing(folder)
    if not lacks:
        return
    whole = [other for other in checkpoints(output_dir) if other != folder and not missing(other)]
    remedy = f"The last whole one is {whole[-1]}: name that." if whole else "No other is whole."
    raise IncompleteCheckpointError(
        f"resume_from_checkpoint: {folder} is not whole ({', '.join(lacks)}), so training could not "
        f"go on as if nothing had happened. {remedy} (To start a new run from its weights alone, make "
        "it base_model.)"
    )
