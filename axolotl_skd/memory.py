"""What a step will need at its peak on one rank, said before training, and what it did need.

A sum of the large things, from shapes alone: it is meant to tell 20 GiB from 30, not 20 from 21. The
backward pass and the rollout do not coincide (caches are freed before), so the peak is the larger of
the two.

Legend: N rows of a window, R rows in flight, B rows of a micro-batch, P prompt, T completion, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from axolotl_skd.held_weights import held_bytes, held_weights, stored_bytes
from axolotl_skd.losses.fused import chunk_size
from axolotl_skd.rollout.draft_length import MAX_DRAFT_TOKENS
from axolotl_skd.rollout.engine import PREFILL_TOKENS, VERIFIED_ELEMENTS
from axolotl_skd.rollout.lm import GIVEN_TOKENS, CausalLM, FullLogitsLM
from axolotl_skd.rollout.types import Source

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
        elsewhere: of the teacher, on other devices and where it waits for its turn.
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
    asked = teacher is not None and not released and not _knows_all(shape)
    training = {
        **always,
        "teacher": teacher_in_training,
        "teacher forward": _asked_bytes(teacher, shape) if asked and beside else 0,
        "gradients": sum(p.numel() * p.element_size() for p in trainable),
        "teacher states": kept,
        "activations": tokens * _activation_bytes(student, shape),
        "loss chunks": chunk * vocab * _LOSS_MATRICES * shape.activation_bytes,
        # A sum in float32 and a chunk's part of it; then the sum, scaled, and its cast.
        "head gradient": sum((8 + p.element_size()) * p.numel() for p in head if p.requires_grad),
    }
    if offloaded:
        cpu = torch.device("cpu")
        teacher_weights[cpu] = teacher_weights.get(cpu, 0) + weight_bytes(teacher)
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
    for weight in held_weights(teacher.model).values():
        sizes[weight.device] = sizes.get(weight.device, 0) + stored_bytes(weight)
    return sizes


def _knows_all(shape: StepShape) -> bool:
    """Has verification left the teacher's states of all that is trained on?"""
    return shape.source is Source.INTERLEAVED and not shape.reads_data


def _asked_bytes(teacher: CausalLM, shape: StepShape) -> int:
    """Of a forward of the teacher over a micro-batch, and of the states that are kept of it."""
    tokens, size = shape.batch_rows * shape.row_tokens, _dtype_bytes(teacher)
    at_once = min(tokens, max(shape.row_tokens, GIVEN_TOKENS))
    return at_once * _layer_bytes(teacher, size) + tokens * teacher.state_size * size


def _waiting_bytes(teacher: CausalLM, shape: StepShape) -> int:
    """What an offloaded teacher holds on its device while the student trains."""
    if _knows_all(shape):
        return held_bytes(teacher.head_module)
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
    return held_bytes(lm.model)


def kv_bytes(lm: CausalLM) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = lm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * _dtype_bytes(lm)


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, None if it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes of a device that nothing holds, None if that cannot be told."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


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
    # Autocast computes in 16 bits, but the residual stream and its norms are of the weights' dtype.
    residual = max(shape.activation_bytes, _dtype_bytes(lm))
    one += 4 * _hidden_size(lm) * (residual - shape.activation_bytes)
    # Full logits in the place of states: all of them, those of the completions, their gradient.
    logits = 3 * lm.state_size * shape.activation_bytes if isinstance(lm, FullLogitsLM) else 0
    if not shape.checkpointing:
        return layers * one + logits
    return layers * _hidden_size(lm) * residual + one + logits


def _layer_bytes(lm: CausalLM, bytes_per_number: int) -> int:
    """Bytes of what one layer computes per token: norms, projections, attention, gated MLP."""
    inner = getattr(lm.config, "intermediate_size", None) or 4 * _hidden_size(lm)
    return bytes_per_number * (12 * _hidden_size(lm) + 4 * inner)


def _hidden_size(lm: CausalLM) -> int:
    return lm.config.hidden_size


def _dtype_bytes(lm: CausalLM) -> int:
    return torch.empty((), dtype=lm.model.dtype).element_size()
