"""The line that says at the start what is going to be trained, from what, and in how much memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from axolotl_skd.config import Distillation
from axolotl_skd.methods import LossRecipe
from axolotl_skd.rollout.types import SamplingParams, Source
from axolotl_skd.trainer import DistillationTrainer
from axolotl_skd.unread_keys import unread_rollout_keys
from axolotl_skd.vocabulary import SharedVocabulary


def start_line(
    trainer: DistillationTrainer,
    distillation: Distillation,
    params: SamplingParams,
    shared: SharedVocabulary | None,
    teacher: str | None,
) -> str:
    """What stands behind `distillation, N steps:` in the log.

    Args:
        trainer: with its distiller attached.
        distillation: the typed config block.
        params: how completions are sampled.
        shared: the vocabulary of both models, None without a teacher.
        teacher: what it is, None without one.
    """
    distiller, tokenizer = trainer.distiller, trainer.processing_class
    parts: dict[str, Any] = {
        "method": f"{distillation.method} ({distillation.method_row.summary})",
        "student": parameter_counts(distiller.student.model),
    }
    if teacher is not None:
        parts["teacher"] = teacher
        parts["vocabulary"] = shared
    if distillation.method_row.loss is LossRecipe.DIVERGENCE:
        parts["loss"] = _loss(distillation)
    if distillation.loss.normalize == "sequence":
        parts["mean"] = "over sequences"
    if distillation.method_row.rolls_out:
        stops = tokenizer.convert_ids_to_tokens(list(params.stop_token_ids))
        parts["stop set"] = dict(zip(params.stop_token_ids, stops, strict=True))
        parts["rollout"] = _settings(distillation)
        if distillation.method_row.source is Source.TEACHER:
            parts["teacher sequences"] = distillation.seqkd.decoding
    parts["memory"] = distiller.forecast
    return "; ".join(f"{name}: {value}" for name, value in parts.items())


def _loss(distillation: Distillation) -> str:
    loss, text = distillation.loss, distillation.divergence
    if text == "jsd":
        text += f" of beta {loss.jsd_beta}"
    elif text.startswith("skew"):
        text += f" of alpha {loss.skew_alpha}"
    if loss.loss_temperature != 1:
        text += f" at temperature {loss.loss_temperature}"
    if gate := distillation.active_gate:
        text += (
            f", gated by {gate.rule} of {gate.top_k}, rejected tokens weigh {gate.reject_weight}"
        )
    if (loss.kd_weight, loss.ce_weight) != (1, 0):
        text = f"{loss.kd_weight} x {text} + {loss.ce_weight} x cross-entropy of data set tokens"
    return text


def _settings(distillation: Distillation) -> str:
    unread = unread_rollout_keys(distillation) | {"stop_token_ids"}
    settings: Mapping[str, Any] = distillation.rollout.model_dump(exclude=unread)
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def parameter_counts(model: nn.Module) -> str:
    """How many, of what dtype, and how many of them train; bitsandbytes packs several 4-bit
    weights into one stored element."""
    total = model.num_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    frozen = "frozen" if trainable == 0 else f"{trainable:,} trainable"
    return f"{total:,} parameters ({frozen}, {dtype})"
