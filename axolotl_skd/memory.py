"""What a step will need at its peak on one rank, said before training, and what it did need.

A sum of the large things, from shapes alone: it is meant to tell 20 GiB from 30, not 20 from 21. The
backward pass and the rollout do not coincide (caches are freed before), so the peak is the larger of
the two.

Legend: N rows of a window, R rows in flight, B rows of a micro-batch, P prompt, T completion, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from axolotl_skd.losses.fused import chunk_size
from axolotl_skd.rollout.draft_length import MAX_DRAFT_TOKENS
from axolotl_skd.rollout.engine import PREFILL_TOKENS, VERIFIED_ELEMENTS
from axolotl_skd.rollout.lm import CausalLM, FullLogitsLM
from axolotl_skd.rollout.types import Source

LOG = logging.getLogger(__name__)

GIB = 2**30

_FLOAT32_BYTES = 4
# Matrices of a chunk of positions by V that the loss holds at one time: logits of both models and a
# gradient.
_LOSS_MATRICES = 3
# Bytes of optimizer state per trainable parameter, by the names of `optimizer:`; others: two moments
# in the parameter's own dtype.
_OPTIMIZER_BYTES = {
    "sgd": 0,
    "adafactor": 0,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adamw_torch_8bit": 2,
    "paged_adamw_8bit": 0,
    "paged_adamw_32bit": 0,
    "lion_8bit": 1,
}


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes that decide about memory.

    Attributes:
        window_rows: N.
        rows_in_flight: R.
        batch_rows: B.
        prompt_tokens: P.
        new_tokens: T, the longest completion that is sampled.
        row_tokens: the longest row that is trained on, sampled or from the data set.
        reads_data: may rows of the data set be trained on as they are?
        source: who samples.
        checkpointing: are activations recomputed in the backward pass?
        activation_bytes: of one number in the student's forward.
        optimizer: Hugging Face's name.
    """

    window_rows: int
    rows_in_flight: int
    batch_rows: int
    prompt_tokens: int
    new_tokens: int
    row_tokens: int
    reads_data: bool
    source: Source
    checkpointing: bool
    activation_bytes: int
    optimizer: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes on the student's device, by what they are for.

    Attributes:
        device: the student's.
        rollout, training: what is there at the peak of each phase; empty without a rollout.
        elsewhere: of the teacher on other devices.
    """

    device: torch.device
    rollout: Mapping[str, int]
    training: Mapping[str, int]
    elsewhere: Mapping[torch.device, int]

    @property
    def phase(self) -> str:
        """Where the peak is."""
        larger = sum(self.rollout.values()) > sum(self.training.values())
        return "rollout" if larger else "training"

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(sum(self.rollout.values()), sum(self.training.values()))

    @property
    def parts(self) -> Mapping[str, int]:
        """What makes up the peak."""
        return self.rollout if self.phase == "rollout" else self.training

    def __str__(self) -> str:
        listed = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size >= 0.005 * GIB
        )
        others = "".join(
            f"; {size / GIB:.2f} GiB on {device}" for device, size in self.elsewhere.items()
        )
        return f"predicted peak {self.peak / GIB:.2f} GiB, in the {self.phase} ({listed}){others}"


def forecast(
    student: CausalLM,
    teacher: CausalLM | None,
    shape: StepShape,
    offloaded: bool = False,
    released: bool = False,
) -> Forecast:
    """Predict the peak of a step on each device.

    Args:
        student, teacher: the models as they are loaded; the same one twice if the teacher is the
            student's base.
        shape: of a step.
        offloaded: does the teacher leave its device, but for its head, while it is not asked?
        released: does it write its sequences before training, and is gone then?
    """
    beside = teacher if teacher is not None and teacher.device == student.device else None
    trainable = [p for p in student.model.parameters() if p.requires_grad]
    teacher_weights = _weights_by_device(teacher, student)
    beside_bytes = teacher_weights.pop(student.device, 0)
    always = {
        "student": weight_bytes(student),
        "teacher": beside_bytes,
        "optimizer": sum(optimizer_bytes(shape.optimizer, p) for p in trainable),
        # Autocast keeps its copies for a whole rollout, and from the forward to the backward pass.
        "cast weights": sum(
            p.numel() * shape.activation_bytes
            for p in trainable
            if p.element_size() > shape.activation_bytes
        ),
    }
    sampling = _sampling(shape.source, student, beside)
    kept = 0
    if beside is not None and shape.source is Source.INTERLEAVED:
        kept = shape.window_rows * shape.new_tokens * beside.state_size * _dtype_bytes(beside)
    rollout: dict[str, int] = {}
    if sampling:
        slots = shape.rows_in_flight * (shape.prompt_tokens + shape.new_tokens)
        prompts = min(shape.rows_in_flight * shape.prompt_tokens, PREFILL_TOKENS)
        logits = min(
            shape.rows_in_flight * MAX_DRAFT_TOKENS * student.vocab_size, VERIFIED_ELEMENTS
        )
        rollout = {
            **always,
            "KV caches": slots * sum(map(kv_bytes, sampling)),
            "teacher states": kept,
            "prompts": prompts * max(_layer_bytes(lm, _dtype_bytes(lm)) for lm in sampling),
            "logits": logits * max(map(_dtype_bytes, sampling)),
        }
    tokens = shape.batch_rows * shape.row_tokens
    vocab, head = student.vocab_size, list(student.head_module.parameters())
    chunk = min(tokens, chunk_size(vocab))
    teacher_in_training = 0 if released else beside_bytes
    if offloaded and not released:
        teacher_in_training = _waiting_bytes(teacher, shape)
    training = {
        **always,
        "teacher": teacher_in_training,
        "gradients": sum(p.numel() * p.element_size() for p in trainable),
        "teacher states": kept,
        "activations": tokens * _activation_bytes(student, shape),
        "loss chunks": chunk * vocab * _LOSS_MATRICES * shape.activation_bytes,
        # A sum in float32 and a chunk's part of it; then the sum, scaled, and its cast.
        "head gradient": sum((8 + p.element_size()) * p.numel() for p in head if p.requires_grad),
    }
    if teacher is not None and beside is None:
        slots = shape.rows_in_flight * (shape.prompt_tokens + shape.new_tokens)
        samples = shape.source in (Source.TEACHER, Source.INTERLEAVED)
        caches = slots * kv_bytes(teacher) if samples else 0
        teacher_weights[teacher.device] = teacher_weights.get(teacher.device, 0) + caches
    return Forecast(student.device, rollout, training, teacher_weights)


def _weights_by_device(teacher: CausalLM | None, student: CausalLM) -> dict[torch.device, int]:
    """Bytes of a teacher's weights on each device, where they are not the student's own."""
    sizes: dict[torch.device, int] = {}
    if teacher is None or teacher.model is student.model:
        return sizes
    for parameter in teacher.model.parameters():
        sizes[parameter.device] = sizes.get(parameter.device, 0) + stored_bytes(parameter)
    return sizes


def _waiting_bytes(teacher: CausalLM, shape: StepShape) -> int:
    """What an offloaded teacher holds on its device while the student trains."""
    if shape.source is Source.INTERLEAVED and not shape.reads_data:
        return sum(map(stored_bytes, teacher.head_module.parameters()))
    return weight_bytes(teacher)  # it is asked about the data set's rows, between activations


def _sampling(source: Source, student: CausalLM, teacher: CausalLM | None) -> list[CausalLM]:
    """The models on the student's device that sample."""
    student_samples = source in (Source.STUDENT, Source.INTERLEAVED)
    teacher_samples = source in (Source.TEACHER, Source.INTERLEAVED)
    models = [student] if student_samples else []
    return models + ([teacher] if teacher_samples and teacher is not None else [])


def step_shape(
    args: TrainingArguments,
    source: Source,
    prompt_tokens: int,
    new_tokens: int,
    data_tokens: int,
    rollout_batch_size: int | None,
    num_rollouts: int,
    activation_bytes: int,
) -> StepShape:
    """The shape of a step under Hugging Face's arguments.

    Args:
        data_tokens: the longest row of the data set that may be trained on as it is, 0 if none is.
        num_rollouts: how often each row is rolled out.
    """
    sampled = 0 if source is Source.DATASET else prompt_tokens + new_tokens
    batch_rows = args.per_device_train_batch_size * num_rollouts
    rows = batch_rows * args.gradient_accumulation_steps
    return StepShape(
        window_rows=rows,
        rows_in_flight=min(rows, rollout_batch_size or rows),
        batch_rows=batch_rows,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        row_tokens=max(sampled, data_tokens),
        reads_data=data_tokens > 0,
        source=source,
        checkpointing=bool(args.gradient_checkpointing),
        activation_bytes=activation_bytes,
        optimizer=str(getattr(args.optim, "value", args.optim)),
    )


def weight_bytes(lm: CausalLM) -> int:
    """Bytes of all parameters as they are stored, quantised ones included."""
    return sum(map(stored_bytes, lm.model.parameters()))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor as it is stored: what a quantised one wraps, not what it stands for.

    Of one that is spread over ranks, of all its parts together.
    """
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        # Where DeepSpeed has put a weight elsewhere, an empty one stands for it.
        return getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def kv_bytes(lm: CausalLM) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = lm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * _dtype_bytes(lm)


# What makes each part of a forecast smaller.
_REMEDIES = {
    "student": "load_in_4bit: true with adapter: qlora",
    "gathered student": "DDP with an 8-bit optimizer:, or a smaller base_model",
    "teacher": "distillation.teacher: load_in_4bit: true, another device, or offload: true",
    "gathered teacher": "distillation.teacher: gather: layers, or load_in_4bit: true",
    "optimizer": "optimizer: adamw_bnb_8bit, or adapter: lora",
    "gradients": "adapter: lora",
    "gradient buckets": "adapter: lora",
    "head gradient": "adapter: lora",
    "activations": "gradient_checkpointing: true, then a smaller micro_batch_size",
    "teacher states": "fewer gradient_accumulation_steps",
    "loss chunks": "a smaller micro_batch_size",
    "KV caches": "a smaller distillation.rollout.rollout_batch_size",
    "logits": "a smaller distillation.rollout.rollout_batch_size",
    "prompts": "a smaller distillation.rollout.rollout_batch_size",
    "cast weights": "adapter: lora, or bf16 weights",
}
_NUM_REMEDIES = 3


def remedies(predicted: Forecast) -> list[str]:
    """The settings that would help most, for the largest parts of the peak first."""
    largest = sorted(predicted.parts, key=predicted.parts.__getitem__, reverse=True)
    named = dict.fromkeys(_REMEDIES[name] for name in largest if predicted.parts[name])
    return list(named)[:_NUM_REMEDIES]


def warn_of_memory(predicted: Forecast) -> None:
    """Say before the first step that a device is too small for what is predicted, and what to do."""
    needs = {predicted.device: predicted.peak, **predicted.elsewhere}
    for device, needed in needs.items():
        there = device_memory(device)
        if there is not None and needed > there:
            LOG.warning(
                "%.1f GiB are predicted to be needed on %s, which has %.1f: this will probably run "
                "out of memory. What would help most: %s.",
                needed / GIB,
                device,
                there / GIB,
                "; ".join(remedies(predicted))
                if device == predicted.device
                else _REMEDIES["teacher"],
            )


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, None if it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


class PeakMemory:
    """The measured counterpart of a forecast: bytes above what was there before any model.

    On an accelerator the allocator's own peak; on a CPU the process's, which knows no tensors.
    """

    def __init__(self, device: torch.device, loaded: int) -> None:
        """
        Args:
            device: the student's.
            loaded: bytes of the models that are loaded by now.
        """
        self._device = device
        self._before = _process_peak() - loaded if device.type == "cpu" else 0

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cpu":
            return _process_peak() - self._before
        return torch.accelerator.max_memory_allocated(self._device)


def _process_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def optimizer_bytes(name: str, parameter: torch.Tensor, masters: bool = False) -> int:
    """Bytes of an optimizer's states of a parameter.

    Args:
        name: the optimizer's, Hugging Face's.
        parameter: in the dtype in which it is loaded.
        masters: does the optimizer work on float32 copies of coarser parameters?
    """
    copied = masters and parameter.element_size() < _FLOAT32_BYTES
    size = _FLOAT32_BYTES if copied else parameter.element_size()
    per_number = _OPTIMIZER_BYTES.get(name, 2 * size) + (size if copied else 0)
    return per_number * parameter.numel()


def _activation_bytes(lm: CausalLM, shape: StepShape) -> int:
    """Bytes per token that wait for the backward pass."""
    layers, one = lm.config.num_hidden_layers, _layer_bytes(lm, shape.activation_bytes)
    # Full logits in the place of states: all of them, those of the completions, their gradient.
    logits = 3 * lm.state_size * shape.activation_bytes if isinstance(lm, FullLogitsLM) else 0
    if not shape.checkpointing:
        return layers * one + logits
    return layers * _hidden_size(lm) * shape.activation_bytes + one + logits


def _layer_bytes(lm: CausalLM, bytes_per_number: int) -> int:
    """Bytes of what one layer computes per token: norms, projections, attention, gated MLP."""
    inner = getattr(lm.config, "intermediate_size", None) or 4 * _hidden_size(lm)
    return bytes_per_number * (12 * _hidden_size(lm) + 4 * inner)


def _hidden_size(lm: CausalLM) -> int:
    return lm.config.hidden_size


def _dtype_bytes(lm: CausalLM) -> int:
    return torch.empty((), dtype=lm.model.dtype).element_size()
