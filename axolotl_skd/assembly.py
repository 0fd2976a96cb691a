"""Putting a run together: teacher, views of both models, completion source, start line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from axolotl_skd.callbacks import TopKStateCallback
from axolotl_skd.config import Distillation, RolloutConfig, TeacherConfig, TopKTarget
from axolotl_skd.losses.divergences import get_divergence
from axolotl_skd.losses.gates import get_gate
from axolotl_skd.losses.objective import Objective
from axolotl_skd.memory import Forecast, forecast, step_shape
from axolotl_skd.methods import LossRecipe, Share
from axolotl_skd.preflight import (
    ConfigConflictError,
    Preflight,
    check_top_k,
    sampling_params,
    warn_of_unknown_tokens,
)
from axolotl_skd.rollout.acceptance import ACCEPTANCE_RULES
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.graphs import Capture, CudaCapture
from axolotl_skd.rollout.lm import CausalLM, probed_lm, rollout_mode
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.stop_strings import StopStrings
from axolotl_skd.rollout.types import SamplingParams, Source
from axolotl_skd.sources import CompletionSource, DatasetSource, RolloutSource
from axolotl_skd.teacher import load_teacher
from axolotl_skd.teacher_sequences import (
    Request,
    StoredSequences,
    fingerprint,
    make_sequences,
    sequence_folder,
)
from axolotl_skd.top_k import ScheduledTopK, TargetAcceptance, TopKPolicy
from axolotl_skd.trainer import DistillationTrainer, Distiller, base_causal_lm
from axolotl_skd.vocabulary import SharedVocabulary, share_vocabulary

LOG = get_logger(__name__)

# A nucleus that the most likely token fills alone.
GREEDY_TOP_P = 1e-12


def assemble(
    trainer: DistillationTrainer,
    distillation: Distillation,
    preflight: Preflight,
    seed: int,
    sequence_len: int,
    prepared_path: Path,
) -> str:
    """Load the teacher and attach it and the completion source to a trainer.

    Args:
        trainer: fresh from Axolotl's builder.
        distillation: the typed config block.
        preflight: what the checks before loading found.
        seed: Axolotl's, used where the block has none.
        sequence_len: Axolotl's, the longest row of the data set.
        prepared_path: Axolotl's folder of prepared data, where teacher sequences are kept.

    Returns:
        the description for the start line.

    Raises:
        ConfigConflictError, teacher.TeacherError, rollout.lm.UnsupportedModelError,
        vocabulary.VocabularyError
    """
    _refuse_lonely_ranks(trainer)
    student_model = base_causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    _refuse_wrapped_head(student_model)
    teacher_model, shared = None, None
    if distillation.method_row.needs_teacher:
        teacher_model = load_teacher(distillation.teacher, trainer.args.device)
        shared = share_vocabulary(
            preflight.student_vocab,
            preflight.teacher_vocab,
            CausalLM(student_model).head.vocab_size,
            CausalLM(teacher_model).head.vocab_size,
        )
        check_top_k(distillation, shared)
        warn_of_unknown_tokens(shared)
    vocab_size = None if shared is None else shared.size
    with rollout_mode(student_model):
        student = probed_lm(
            student_model,
            "base_model",
            vocab_size=vocab_size,
            precision=trainer.accelerator.autocast,
            new_capture=_new_capture(distillation, "student", student_model.device),
        )
        teacher = None
        if teacher_model is not None:
            teacher = probed_lm(
                teacher_model,
                "distillation.teacher.base_model",
                vocab_size=vocab_size,
                # The student's mixed precision is not the teacher's: it computes in its own dtype.
                precision=partial(torch.autocast, teacher_model.device.type, enabled=False),
                new_capture=_new_capture(distillation, "teacher", teacher_model.device),
            )

    params = sampling_params(distillation, preflight.stop_token_ids)
    seed = seed if distillation.seed is None else distillation.seed
    source = _source(trainer, distillation, params, student, teacher, seed, prepared_path)
    described = None if teacher is None else _parameters(teacher.model)
    if distillation.method_row.loss is LossRecipe.CROSS_ENTROPY:
        teacher = teacher_model = None  # it has written its sequences and is needed no more
    trainer.attach(
        Distiller(
            source=source,
            student=student,
            teacher=teacher,
            objective=_objective(distillation),
            by_sequence=distillation.loss.normalize == "sequence",
            forecast=_forecast(trainer, distillation, student, teacher, sequence_len),
        )
    )
    return _description(trainer, distillation, params, shared, described)


def _objective(distillation: Distillation) -> Objective:
    if distillation.method_row.loss is LossRecipe.CROSS_ENTROPY:
        return Objective(divergence=None)
    loss, gate = distillation.loss, distillation.active_gate
    return Objective(
        divergence=get_divergence(
            distillation.divergence,
            beta=loss.jsd_beta,
            alpha=loss.skew_alpha,
            temperature=loss.loss_temperature,
        ),
        gate=gate and get_gate(gate.rule, gate.top_k),
        reject_weight=gate.reject_weight if gate else 0.0,
        kd_weight=loss.kd_weight,
        ce_weight=loss.ce_weight,
    )


def _forecast(
    trainer: DistillationTrainer,
    distillation: Distillation,
    student: CausalLM,
    teacher: CausalLM | None,
    sequence_len: int,
) -> Forecast:
    rollout, method = distillation.rollout, distillation.method_row
    half = trainer.args.bf16 or trainer.args.fp16
    shape = step_shape(
        trainer.args,
        source=method.source,
        prompt_tokens=rollout.max_prompt_tokens,
        new_tokens=rollout.max_new_tokens,
        data_tokens=sequence_len if method.needs_completions else 0,
        rollout_batch_size=rollout.rollout_batch_size,
        num_rollouts=rollout.num_rollouts,
        activation_bytes=2 if half else student.model.dtype.itemsize,
    )
    return forecast(student, teacher, shape)


def _source(
    trainer: DistillationTrainer,
    distillation: Distillation,
    params: SamplingParams,
    student: CausalLM,
    teacher: CausalLM | None,
    seed: int,
    prepared_path: Path,
) -> CompletionSource:
    method = distillation.method_row
    if not method.rolls_out:
        return DatasetSource(seed)
    engine = RolloutEngine(
        student,
        teacher,
        accept=ACCEPTANCE_RULES[distillation.rollout.acceptance],
        stop_strings=_stop_strings(trainer, distillation.rollout),
        rollout_batch_size=distillation.rollout.rollout_batch_size,
        fixed_shapes=student.graphs,
    )
    samplers = {
        Source.INTERLEAVED: engine.interleave,
        Source.STUDENT: engine.sample_student,
        Source.TEACHER: engine.sample_teacher,
    }
    collator, sample = trainer.train_data_collator, samplers[method.source]
    if method.source is Source.TEACHER:
        sample = _stored_sequences(trainer, distillation, params, engine, seed, prepared_path)
    return RolloutSource(
        sample,
        method.source,
        params,
        share=_share(distillation),
        num_rollouts=distillation.rollout.num_rollouts,
        once=method.source is Source.TEACHER,
        mask_truncated=distillation.rollout.mask_truncated,
        max_new_tokens=distillation.rollout.max_new_tokens,
        seed=seed,
        pad_token_id=collator.pad_token_id,
        pad_to_multiple_of=collator.pad_to_multiple_of,
        top_k=_top_k(trainer, distillation, student.vocab_size),
    )


def _stored_sequences(
    trainer: DistillationTrainer,
    distillation: Distillation,
    params: SamplingParams,
    engine: RolloutEngine,
    seed: int,
    prepared_path: Path,
) -> StoredSequences:
    """The teacher's completions of the whole training set, made where they are not there yet."""
    rollout, greedy = distillation.rollout, distillation.seqkd.decoding == "greedy"
    if greedy:
        params = replace(params, teacher_temperature=1.0, teacher_top_p=GREEDY_TOP_P)
    accelerator, args = trainer.accelerator, trainer.args
    settings = {
        "teacher": fingerprint(engine.teacher.model),
        "vocabulary": engine.teacher.vocab_size,
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": params.teacher_temperature,
        "top_p": params.teacher_top_p,
        "stop_token_ids": params.stop_token_ids,
        "stop_strings": rollout.stop_strings,
        "seed": seed,
    }
    with torch.no_grad():
        sequences = make_sequences(
            list(_requests(trainer, seed, rollout.num_rollouts)),
            sequence_folder(prepared_path, settings),
            engine.sample_teacher,
            params,
            max_new_tokens=rollout.max_new_tokens,
            batch_size=rollout.rollout_batch_size
            or args.per_device_train_batch_size * args.gradient_accumulation_steps,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
        )
    return StoredSequences(sequences)


def _requests(trainer: DistillationTrainer, seed: int, num_rollouts: int) -> Iterator[Request]:
    """A sequence per row of the training set and rollout, as `RolloutSource` will ask for them."""
    for row in trainer.train_dataset:
        batch = trainer.train_data_collator([row])
        prompt = batch["input_ids"][0, : int(batch["prompt_lengths"])]
        for index in range(num_rollouts):
            yield Request(prompt, int(row_streams(seed, 0, batch["sample_ids"], index)))


def _stop_strings(trainer: DistillationTrainer, rollout: RolloutConfig) -> StopStrings | None:
    if not rollout.stop_strings:
        return None
    decode = partial(
        trainer.processing_class.decode,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return StopStrings(rollout.stop_strings, decode)


def _top_k(
    trainer: DistillationTrainer, distillation: Distillation, vocab_size: int
) -> TopKPolicy | None:
    """K of each step, None where the method or the acceptance rule knows none."""
    rollout = distillation.rollout
    if distillation.method_row.source is not Source.INTERLEAVED or rollout.acceptance != "top_k":
        return None
    top_k, accelerator = rollout.teacher_top_k, trainer.accelerator
    if isinstance(top_k, int):
        return ScheduledTopK(top_k, top_k)
    if not isinstance(top_k, TopKTarget):
        return ScheduledTopK(top_k.start, top_k.end, top_k.schedule)
    controller = TargetAcceptance(
        top_k.target_acceptance,
        top_k.start,
        vocab_size,
        lambda counts: accelerator.reduce(counts.to(accelerator.device), reduction="sum"),
    )
    trainer.add_callback(TopKStateCallback(controller))
    return controller


def _new_capture(
    distillation: Distillation, name: str, device: torch.device
) -> Callable[[], Capture] | None:
    """How a model's decoding becomes graphs, None if it was not asked for or cannot be had there."""
    if not distillation.rollout.cuda_graphs:
        return None
    if not distillation.method_row.rolls_out:
        reason = f"method {distillation.method} samples nothing"
    elif device.type != "cuda":
        reason = f"it is on a device of type {device.type}"
    elif device.index not in (None, torch.cuda.current_device()):
        # A graph records what happens on the current device, and nothing else.
        reason = f"it is on {device}, not on this process's own device"
    else:
        return CudaCapture
    LOG.warning("distillation.rollout.cuda_graphs: true has no effect on the %s: %s", name, reason)
    return None


def _share(distillation: Distillation) -> Callable[[float], float]:
    """Probability that a sequence is rolled out, by the share of steps done."""
    rule = distillation.method_row.share
    if rule is Share.LATE:
        return lambda progress: float(progress >= distillation.switch_at)
    constant = {Share.ALL: 1.0, Share.HALF: 0.5, Share.LMBDA: distillation.lmbda}[rule]
    return lambda _progress: constant


def _refuse_wrapped_head(model: nn.Module) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ConfigConflictError(
            f"the student's output head is wrapped by {type(head).__name__}, but the distillation "
            "loss applies the head by itself. Take lm_head (and, with tied embeddings, embed_tokens) "
            "out of lora_target_modules / lora_modules_to_save."
        )


def _description(
    trainer: DistillationTrainer,
    distillation: Distillation,
    params: SamplingParams,
    shared: SharedVocabulary | None,
    teacher: str | None,
) -> str:
    distiller, tokenizer = trainer.distiller, trainer.processing_class
    parts: dict[str, Any] = {
        "method": f"{distillation.method} ({distillation.method_row.summary})",
        "student": _parameters(distiller.student.model),
    }
    if teacher is not None:
        quantised = _quantisation(distillation.teacher)
        parts["teacher"] = f"{distillation.teacher.base_model}, {teacher}{quantised}"
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
    settings: Mapping[str, Any] = distillation.rollout.model_dump(exclude={"stop_token_ids"})
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _quantisation(teacher: TeacherConfig) -> str:
    if teacher.load_in_8bit:
        return ", quantised to int8"
    return f", quantised to {teacher.bnb_4bit_quant_type}" if teacher.load_in_4bit else ""


def _parameters(model: nn.Module) -> str:
    """Parameter counts; bitsandbytes packs several 4-bit weights into one stored element."""
    total = model.num_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    frozen = "frozen" if trainable == 0 else f"{trainable:,} trainable"
    return f"{total:,} parameters ({frozen}, {dtype})"


def _refuse_lonely_ranks(trainer: DistillationTrainer) -> None:
    """Several launched ranks of which each believes to be the only one would train apart."""
    launched, seen = int(os.environ.get("WORLD_SIZE", "1")), trainer.accelerator.num_processes
    if launched != seen:
        raise ConfigConflictError(
            f"{launched} ranks were launched, but each sees {seen}: they would train independently "
            "of each other. On CPU ranks set ACCELERATE_USE_CPU=true in the environment; otherwise "
            "check the launcher and its rendezvous."
        )
    if trainer.args.n_gpu > 1:
        raise ConfigConflictError(
            f"one process sees {trainer.args.n_gpu} GPUs, which makes torch's DataParallel of it. Use "
            "one process per GPU (axolotl train's default launcher), or set CUDA_VISIBLE_DEVICES."
        )
