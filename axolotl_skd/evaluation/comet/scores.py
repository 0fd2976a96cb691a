"""The function that scores translations: chooses the backend, which then does the work."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from axolotl_skd.evaluation.comet.files import find_checkpoint

LOG = logging.getLogger(__name__)

CHECKPOINT_VARIABLE = "SKD_COMET_CHECKPOINT"
ENCODER_VARIABLE = "SKD_COMET_ENCODER"
PYTHON_VARIABLE = "SKD_COMET_PYTHON"


def comet_scores(
    sources: Sequence[str],
    translations: Sequence[str],
    references: Sequence[str],
    *,
    checkpoint: str | Path | None = None,
    encoder: str | Path | None = None,
    python: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> list[float]:
    """COMET x 100 of each translation, in the order given.

    In float32 like unbabel-comet's Python interface. Its command `comet-score` computes in float16
    (version 2.2.7) and so prints slightly different numbers. The built-in estimator downloads
    nothing.

    Args:
        sources: texts in the source language.
        translations: what the model made of them.
        references: one reference translation each.
        checkpoint: a folder with `hparams.yaml` and `checkpoints/model.ckpt`, or that file; None =
            the variable `SKD_COMET_CHECKPOINT`, else `Unbabel/wmt22-comet-da` in the local Hugging
            Face cache.
        encoder: folder with the encoder's `config.json` and `tokenizer.json`, or its name in the
            local cache; None = the variable `SKD_COMET_ENCODER`, else the name in the checkpoint.
        python: an interpreter that has unbabel-comet, which then does the work; None = the variable
            `SKD_COMET_PYTHON`, else the built-in estimator does it.
        batch_size: translations at a time; no influence on the scores beyond rounding.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ..., or `"auto"` = the first GPU if there is one.

    Raises:
        CometUnavailableError: the checkpoint, the encoder's files or a working `python` is missing.
        CometCheckpointError: the checkpoint is of a kind that the built-in estimator does not know.
        TypeError: if one of the lists is one bare string.
        ValueError: if the lists are not of one length, `encoder` and `python` are both given, or the
            device is unknown or not there.
    """
    samples = {"sources": sources, "translations": translations, "references": references}
    for name, texts in samples.items():
        if isinstance(texts, str):
            raise TypeError(f"{name} is one string; pass a list of texts")
    if not len(sources) == len(translations) == len(references):
        counts = ", ".join(f"{len(texts)} {name}" for name, texts in samples.items())
        raise ValueError(f"COMET compares texts one by one, but got {counts}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; needed is 1 or more")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f"device is {device!r}; needed is auto, cpu, cuda or cuda:<number>")
    python = _option(python, PYTHON_VARIABLE)
    encoder = _option(encoder, ENCODER_VARIABLE)
    if python and encoder:
        raise ValueError(
            f"both a Python with unbabel-comet ({python}) and an encoder ({encoder}) are given, but "
            "unbabel-comet takes the encoder that its checkpoint names; leave out one of them "
            f"(options or the variables {PYTHON_VARIABLE}, {ENCODER_VARIABLE})"
        )
    files = find_checkpoint(_option(checkpoint, CHECKPOINT_VARIABLE))
    if not translations:
        return []
    LOG.info("COMET scores %d translations by %s", len(translations), files.weights)
    if python:
        from axolotl_skd.evaluation.comet.package import score_with_package

        scores = score_with_package(
            files, python, sources, translations, references, batch_size, device
        )
    else:
        from axolotl_skd.evaluation.comet.estimator import load_estimator

        estimator = load_estimator(files, encoder).to(_resolve_device(device))
        scores = estimator.score(sources, translations, references, batch_size)
    return [100 * score for score in scores]


def _resolve_device(device: str) -> str:
    """`device`, or where it is `"auto"` the first GPU if there is one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA device; use cpu or auto")
    return device


def _option(value: str | Path | None, variable: str) -> str | None:
    """An option, else the variable of that name; an empty one counts as not set."""
    return str(value) if value is not None else os.environ.get(variable) or None
