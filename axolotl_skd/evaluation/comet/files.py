"""Where COMET's files are: in a folder that the user names, or in the local Hugging Face cache.

The cache is only read. A checkpoint of 2.3 GB is not downloaded in passing, and an evaluation does
not depend on a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from axolotl_skd.evaluation.comet.errors import CometUnavailableError

DEFAULT_CHECKPOINT = "Unbabel/wmt22-comet-da"
DEFAULT_ENCODER = "xlm-roberta-large"

_HPARAMS = "hparams.yaml"
_WEIGHTS = "checkpoints/model.ckpt"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """A checkpoint in the published layout.

    Attributes:
        hparams: `hparams.yaml`, which says what kind of model it is.
        weights: `checkpoints/model.ckpt`, the Lightning checkpoint.
    """

    hparams: Path
    weights: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFiles:
    """The encoder without its weights, which are part of the checkpoint.

    Attributes:
        config: `config.json` of transformers.
        tokenizer: `tokenizer.json` of tokenizers.
    """

    config: Path
    tokenizer: Path


def find_checkpoint(place: str | Path | None) -> CheckpointFiles:
    """The files of a checkpoint.

    Args:
        place: folder with `hparams.yaml` and `checkpoints/model.ckpt`, or that file; None =
            `Unbabel/wmt22-comet-da` in the local cache.

    Raises:
        CometUnavailableError: a file is missing; says how to get it.
    """
    if place is None:
        hparams, weights = (_cached(DEFAULT_CHECKPOINT, name) for name in (_HPARAMS, _WEIGHTS))
        where = f"the local Hugging Face cache holds no {DEFAULT_CHECKPOINT}"
    else:
        folder = Path(place)
        if folder.is_file():
            folder = folder.parent.parent
        hparams, weights = (_existing(folder / name) for name in (_HPARAMS, _WEIGHTS))
        where = f"{place} is no folder with {_HPARAMS} and {_WEIGHTS}"
    if hparams is None or weights is None:
        raise CometUnavailableError(
            f"no COMET checkpoint: {where}. Get it once (2.3 GB) into the cache with\n"
            f"    hf download {DEFAULT_CHECKPOINT} {_HPARAMS} {_WEIGHTS}\n"
            f"    hf download {DEFAULT_ENCODER} {_CONFIG} {_TOKENIZER}\n"
            f"or name a local folder with {_HPARAMS} and {_WEIGHTS} by the option checkpoint or the "
            "variable SKD_COMET_CHECKPOINT"
        )
    return CheckpointFiles(hparams=hparams, weights=weights)


def find_encoder(name: str) -> EncoderFiles:
    """The files of an encoder.

    Args:
        name: a folder, or a hub id that is looked up in the local cache.

    Raises:
        CometUnavailableError: a file is missing; says how to get it.
    """
    if Path(name).is_dir():
        config, tokenizer = (_existing(Path(name) / file) for file in (_CONFIG, _TOKENIZER))
        where = f"the folder {name} has not both of {_CONFIG} and {_TOKENIZER}"
    else:
        config, tokenizer = (_cached(name, file) for file in (_CONFIG, _TOKENIZER))
        where = f"there is no folder {name!r}, nor is it in the local Hugging Face cache"
    if config is None or tokenizer is None:
        raise CometUnavailableError(
            f"no files of COMET's encoder: {where}. Get them once (9 MB) into the cache, for "
            f"{DEFAULT_CHECKPOINT} with\n"
            f"    hf download {DEFAULT_ENCODER} {_CONFIG} {_TOKENIZER}\n"
            f"or name a local folder with {_CONFIG} and {_TOKENIZER} by the option encoder or the "
            "variable SKD_COMET_ENCODER"
        )
    return EncoderFiles(config=config, tokenizer=tokenizer)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _cached(repo: str, file: str) -> Path | None:
    """`file` of a hub repository as it lies in the local cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repo, file)
    except HFValidationError:  # a mistyped path is no hub id
        return None
    return Path(path) if isinstance(path, str) else None
