"""Which settings would help most where memory is short.

A setting saves about a known share of some parts of a forecast (of `memory.py`). Named are those that
are not taken yet and that the run may take, the one that saves most first; each next one by what is
left after it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from axolotl.utils.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments

from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.memory import GIB, Forecast, StepShape, device_memory
from axolotl_skd.sharding import Engine

LOG = get_logger(__name__)

FOUR_BIT_TEACHER = "distillation.teacher.load_in_4bit: true"
OTHER_DEVICE = "distillation.teacher.device: or device_map: auto"
OFFLOAD = "distillation.teacher.offload: true"
BY_LAYERS = "distillation.teacher.gather: layers"
LORA = "adapter: lora"
QLORA = "adapter: qlora with load_in_4bit: true"
OPTIMIZER = "optimizer: adamw_bnb_8bit"
CHECKPOINTING = "gradient_checkpointing: true"
MICRO_BATCH = "a smaller micro_batch_size"
ACCUMULATION = "fewer gradient_accumulation_steps"
IN_FLIGHT = "a smaller distillation.rollout.rollout_batch_size"

_TRAINABLE = {
    part: 0.98
    for part in ("optimizer", "gradients", "gradient buckets", "head gradient", "cast weights")
}
# Shares of the parts that are saved: 4 of 16 bits are left, 8 of 32; what can be halved is halved.
_SAVED: Mapping[str, Mapping[str, float]] = {
    FOUR_BIT_TEACHER: {"teacher": 0.7, "gathered teacher": 0.7},
    OTHER_DEVICE: {"teacher": 1.0, "teacher states": 1.0},
    OFFLOAD: {"teacher": 0.9},
    BY_LAYERS: {"gathered teacher": 0.9},
    LORA: _TRAINABLE,
    QLORA: {**_TRAINABLE, "student": 0.7},
    OPTIMIZER: {"optimizer": 0.75},
    CHECKPOINTING: {"activations": 0.8},
    MICRO_BATCH: {"activations": 0.5, "loss chunks": 0.5, "teacher forward": 0.5},
    IN_FLIGHT: {"KV caches": 0.5, "logits": 0.5, "prompts": 0.5},
    ACCUMULATION: {"teacher states": 0.5, "KV caches": 0.5},
}
_NUM_NAMED = 3
# Less than this share of all is no help.
_WORTHWHILE = 0.05
# A forecast is a rough sum, and fragments of free memory are of no use: more than this share is a risk.
_SAFE_SHARE = 0.9


def taken_of_teacher(teacher: TeacherConfig, engine: Engine) -> set[str]:
    """Settings of the teacher that a run has already, or may not have beside its others."""
    sharded, elsewhere = engine.shards_weights, bool(teacher.device or teacher.device_map)
    is_so = {
        FOUR_BIT_TEACHER: teacher.student_base or teacher.quantised or teacher.offload,
        OTHER_DEVICE: teacher.student_base or elsewhere or teacher.offload or sharded,
        OFFLOAD: teacher.student_base
        or teacher.quantised
        or teacher.offload
        or elsewhere
        or sharded,
        BY_LAYERS: not sharded or teacher.gather == "layers",
    }
    return {setting for setting, holds in is_so.items() if holds}


def taken_of_student(
    args: TrainingArguments, shape: StepShape, student: nn.Module, engine: Engine
) -> set[str]:
    """The same, of the student and its training."""
    is_so = {
        LORA: any(isinstance(module, BaseTunerLayer) for module in student.modules()),
        QLORA: getattr(student, "is_loaded_in_4bit", False) or engine.shards_weights,
        OPTIMIZER: any(word in shape.optimizer for word in ("8bit", "paged", "sgd", "adafactor")),
        CHECKPOINTING: shape.checkpointing,
        MICRO_BATCH: args.per_device_train_batch_size == 1,
        ACCUMULATION: args.gradient_accumulation_steps == 1,
        IN_FLIGHT: shape.rows_in_flight == 1,
    }
    return {setting for setting, holds in is_so.items() if holds}


def warn_before_loading(
    needed: int, device: torch.device, free: int | None, without: Collection[str]
) -> None:
    """Say that there is no room for a teacher's weights, before they are read.

    Args:
        needed: bytes of them.
        device: where they are to be.
        free: bytes that are free there, None if that cannot be told.
        without: settings that are not to be named.
    """
    if free is not None and needed > free:
        _say(needed, device, free, remedies({"teacher": needed}, {*without, OFFLOAD}))


def remedies(parts: Mapping[str, float], without: Collection[str] = ()) -> list[str]:
    """Up to three settings, the most helpful first.

    Args:
        parts: bytes by what they are for, on one device at one time.
        without: settings that are not to be named.
    """
    left, named = dict(parts), []
    least = _WORTHWHILE * sum(parts.values())

    def saved(setting: str) -> float:
        return sum(share * left.get(part, 0) for part, share in _SAVED[setting].items())

    while len(named) < _NUM_NAMED:
        open_to = [one for one in _SAVED if one not in (*without, *named) and saved(one) > least]
        if not open_to:
            break
        best = max(open_to, key=saved)
        for part, share in _SAVED[best].items():
            left[part] = (1 - share) * left.get(part, 0)
        named.append(best)
    return named


def warn_of_memory(predicted: Forecast, without: Collection[str] = ()) -> None:
    """Say before the first step that a device may be too small for what is predicted, and what to do.

    Args:
        predicted: for all devices.
        without: settings that are not to be named.
    """
    if predicted.phase == "rollout":
        without = {*without, OFFLOAD}  # for which the teacher is there all the same
    _warn(predicted.device, predicted.peak, remedies(predicted.parts, without))
    for device, needed in predicted.elsewhere.items():
        _warn(device, needed, remedies({"teacher": needed}, without))


def _warn(device: torch.device, needed: int, named: list[str]) -> None:
    there = device_memory(device)
    if there is not None and needed > _SAFE_SHARE * there:
        _say(needed, device, there, named)


def _say(needed: int, device: torch.device, there: int, named: list[str]) -> None:
    LOG.warning(
        "%.1f GiB are predicted to be needed on %s, which has %.1f: this may run out of memory. "
        "What would help most: %s.",
        needed / GIB,
        device,
        there / GIB,
        "; ".join(named) or "smaller models",
    )
