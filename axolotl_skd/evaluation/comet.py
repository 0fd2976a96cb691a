"""COMET, the learned score of a translation (Rei et al., 2022, https://aclanthology.org/2022.wmt-1.52)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DEFAULT_MODEL = "Unbabel/wmt22-comet-da"


class CometUnavailableError(RuntimeError):
    """No COMET checkpoint, or no working program to score with; says how to get one."""


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

    Args:
        sources: texts in the source language.
        translations: what the model made of them.
        references: one reference translation each.
        checkpoint: a folder with `hparams.yaml` and `checkpoints/model.ckpt`; None = the variable
            `SKD_COMET_CHECKPOINT`, else `Unbabel/wmt22-comet-da` in the local Hugging Face cache.
        encoder: folder or hub id of the encoder's config and tokenizer; None = the variable
            `SKD_COMET_ENCODER`, else what the checkpoint names.
        python: a Python interpreter with the package unbabel-comet, which then does the work;
            None = the variable `SKD_COMET_PYTHON`, else the estimator of this package is used.
        batch_size: translations at a time; no influence on the scores beyond rounding.
        device: a torch device, or `"auto"` = the first GPU if there is one.

    Raises:
        CometUnavailableError: there is no checkpoint, or the given Python cannot score.
        ValueError: the lists are not of one length, or the checkpoint is of an unknown kind.
    """
    raise NotImplementedError
