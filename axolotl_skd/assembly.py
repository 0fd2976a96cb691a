"""Putting a run together: teacher, views of both models, completion source, start line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from axolotl.utils.logging import get_logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from axolotl_skd.completion_source import completion_source
from axolotl_skd.config import Distillation
from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.losses.divergences import get_divergence
from axolotl_skd.losses.gates import get_gate
from axolotl_skd.losses.objective import Objective
from axolotl_skd.memory import Forecast, StepShape, forecast, free_memory, step_shape
from axolotl_skd.memory_of_ranks import Division, on_each_rank
from axolotl_skd.memory_remedies import (
    taken_of_student,
    taken_of_teacher,
    warn_before_loading,
    warn_of_memory,
)
from axolotl_skd.methods import LossRecipe
from axolotl_skd.offload import Offloaded
from axolotl_skd.preflight import (
    ConfigConflictError,
    Preflight,
    check_top_k,
    sampling_params,
    warn_of_unknown_tokens,
)
from axolotl_skd.ranks import num_launched
from axolotl_skd.rollout.graphs import Capture, CudaCapture
from axolotl_skd.rollout.lm import CausalLM, probed_lm, rollout_mode
from axolotl_skd.sharding import (
    AtHand,
    Engine,
    at_hand,
    layers_of,
    loaded_whole,
    running_engine,
    spread_teacher,
)
from axolotl_skd.start_line import parameter_counts, start_line
from axolotl_skd.teacher import base_alone, is_quantised, load_teacher, read_teacher_config
from axolotl_skd.teacher_size import bytes_to_load
from axolotl_skd.trainer import DistillationTrainer, Distiller, base_causal_lm
from axolotl_skd.vocabulary import SharedVocabulary, share_vocabulary

LOG = get_logger(__name__)


def assemble(
    trainer: DistillationTrainer,
    distillation: Distillation,
    preflight: Preflight,
    engine: Engine,
    seed: int,
    sequence_len: int,
    prepared_path: Path,
) -> str:
    """Load the teacher and attach it and the completion source to a trainer.

    Args:
        trainer: fresh from Axolotl's builder.
        distillation: the typed config block.
        preflight: what the checks before loading found.
        engine: that the config asks for.
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
    _take_one_gpu(trainer, distillation.teacher)
    accelerator = trainer.accelerator
    _refuse_other_engine(engine, running_engine(accelerator))
    student_model = base_causal_lm(accelerator.unwrap_model(trainer.model))
    _refuse_wrapped_head(student_model)
    teacher_model = None
    if distillation.method_row.needs_teacher:
        teacher_model = _teacher_model(trainer, distillation, student_model, engine)
    weights_with = partial(
        at_hand,
        accelerator,
        engine,
        lambda: trainer.model_wrapped,
        student_model,
        on_any_rank=trainer.on_any_rank,
        by_layer=distillation.teacher.gather == "layers",
    )
    weights = weights_with(teacher_model)
    with rollout_mode(student_model), weights.student(), weights.teacher():
        return _assemble(
            trainer,
            distillation,
            preflight,
            student_model,
            teacher_model,
            weights,
            weights_with,
            engine,
            seed if distillation.seed is None else distillation.seed,
            sequence_len,
            prepared_path,
        )


def _teacher_model(
    trainer: DistillationTrainer,
    distillation: Distillation,
    student: PreTrainedModel,
    engine: Engine,
) -> PreTrainedModel:
    """The student itself, or a model loaded, and spread where the student will be."""
    if distillation.teacher.student_base:
        return student
    # Quantised weights are small, and cannot be cut: they stay whole on every rank.
    if not engine.shards_weights or is_quantised(distillation.teacher):
        _warn_before_loading(distillation.teacher, trainer.args.device, engine)
        with loaded_whole(trainer.args, engine):
            return load_teacher(distillation.teacher, trainer.args.device)
    teacher = load_teacher(
        distillation.teacher, None if engine is Engine.ZERO_3 else trainer.args.device
    )
    if distillation.teacher.gather == "layers" and not layers_of(teacher):
        raise ConfigConflictError(
            "distillation.teacher.gather: layers: transformers does not say what the layers of "
            f"{type(teacher).__name__} are (_no_split_modules). Set gather: whole."
        )
    spread_teacher(teacher, trainer.accelerator, engine)
    return teacher


def _warn_before_loading(config: TeacherConfig, beside: torch.device, engine: Engine) -> None:
    if config.device_map or engine is Engine.ZERO_3:  # which would spread the empty model, too
        return
    needed = bytes_to_load(config, read_teacher_config(config))
    if needed is not None:
        device = torch.device(config.device or beside)
        without = taken_of_teacher(config, engine)
        warn_before_loading(needed, device, free_memory(device), without)


def _assemble(
    trainer: DistillationTrainer,
    distillation: Distillation,
    preflight: Preflight,
    student_model: PreTrainedModel,
    teacher_model: PreTrainedModel | None,
    weights: AtHand,
    weights_with: Callable[[PreTrainedModel | None], AtHand],
    engine: Engine,
    seed: int,
    sequence_len: int,
    prepared_path: Path,
) -> str:
    """`assemble` with both models loaded and whole, in rollout mode."""
    shared = None
    if teacher_model is not None:
        shared = share_vocabulary(
            preflight.student_vocab,
            preflight.teacher_vocab,
            CausalLM(student_model).head.vocab_size,
            CausalLM(teacher_model).head.vocab_size,
        )
        check_top_k(distillation, shared)
        warn_of_unknown_tokens(shared)
    student, teacher = _views(trainer, distillation, student_model, teacher_model, shared)
    params = sampling_params(distillation, preflight.stop_token_ids)
    shape = _shape(trainer, distillation, student, sequence_len)
    predicted = _forecast(trainer, distillation, student, teacher, shape, engine)
    settled = taken_of_teacher(distillation.teacher, engine)
    settled |= taken_of_student(trainer.args, shape, student_model, engine)
    warn_of_memory(predicted, without=settled)
    source = completion_source(
        trainer, distillation, params, student, teacher, weights, seed, prepared_path
    )
    described = None if teacher is None else _described(teacher, distillation)
    if distillation.method_row.loss is LossRecipe.CROSS_ENTROPY:
        # It has written its sequences and is needed no more.
        teacher, weights = None, weights_with(None)
    if teacher is not None and distillation.teacher.offload:
        weights = replace(weights, teacher=Offloaded(teacher.model).at_hand)
    trainer.attach(
        Distiller(
            source=source,
            student=student,
            teacher=teacher,
            objective=_objective(distillation),
            by_sequence=distillation.loss.normalize == "sequence",
            forecast=predicted,
            at_hand=weights,
            skip_non_finite=distillation.on_non_finite == "skip",
        )
    )
    return start_line(trainer, distillation, params, shared, described)


def _views(
    trainer: DistillationTrainer,
    distillation: Distillation,
    student_model: PreTrainedModel,
    teacher_model: PreTrainedModel | None,
    shared: SharedVocabulary | None,
) -> tuple[CausalLM, CausalLM | None]:
    """Both models, tried out."""
    vocab_size = None if shared is None else shared.size
    student = probed_lm(
        student_model,
        "base_model",
        vocab_size=vocab_size,
        precision=trainer.accelerator.autocast,
        new_capture=_new_capture(distillation, "student", student_model.device),
    )
    if teacher_model is None:
        return student, None
    if distillation.teacher.student_base:
        precision = base_alone(_adapted(trainer), trainer.accelerator.autocast)
    else:
        # The student's mixed precision is not the teacher's: it computes in its own dtype.
        precision = partial(torch.autocast, trainer.args.device.type, enabled=False)
    teacher = probed_lm(
        teacher_model,
        "distillation.teacher.base_model",
        vocab_size=vocab_size,
        precision=precision,
        new_capture=_new_capture(distillation, "teacher", teacher_model.device),
    )
    return student, teacher


def _adapted(trainer: DistillationTrainer) -> PeftModel:
    """The student with its adapter."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        raise ConfigConflictError(
            "distillation.teacher.student_base: true, but the student has no adapter that could be "
            "switched off. Set adapter: lora or qlora, or name a teacher by base_model."
        )
    return model


def _described(teacher: CausalLM, distillation: Distillation) -> str:
    """The teacher, for the start line."""
    if distillation.teacher.student_base:
        return "the student's base, its adapter switched off"
    adapter = distillation.teacher.adapter
    quantised = distillation.teacher.quantisation
    return ", ".join(
        part
        for part in (
            distillation.teacher.base_model,
            adapter and f"with the adapter {adapter}",
            parameter_counts(teacher.model),
            quantised and f"quantised to {quantised}",
            distillation.teacher.offload and "offloaded",
        )
        if part
    )


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


def _shape(
    trainer: DistillationTrainer, distillation: Distillation, student: CausalLM, sequence_len: int
) -> StepShape:
    rollout, method = distillation.rollout, distillation.method_row
    half = trainer.args.bf16 or trainer.args.fp16
    return step_shape(
        trainer.args,
        source=method.source,
        prompt_tokens=rollout.max_prompt_tokens,
        new_tokens=rollout.max_new_tokens,
        data_tokens=sequence_len if method.needs_completions else 0,
        rollout_batch_size=rollout.rollout_batch_size,
        num_rollouts=rollout.num_rollouts,
        activation_bytes=2 if half else student.model.dtype.itemsize,
    )


def _forecast(
    trainer: DistillationTrainer,
    distillation: Distillation,
    student: CausalLM,
    teacher: CausalLM | None,
    shape: StepShape,
    engine: Engine,
) -> Forecast:
    """Of a rank among the others."""
    alone = forecast(
        student,
        teacher,
        shape,
        offloaded=distillation.teacher.offload,
        released=distillation.method_row.loss is LossRecipe.CROSS_ENTROPY,
    )
    division = Division(
        engine,
        trainer.accelerator.num_processes,
        teacher=engine.shards_weights
        and teacher is not None
        and not is_quantised(distillation.teacher),
        by_layer=distillation.teacher.gather == "layers",
    )
    return on_each_rank(alone, student, teacher, shape, division)


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


def _refuse_wrapped_head(model: nn.Module) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ConfigConflictError(
            f"the student's output head is wrapped by {type(head).__name__}, but the distillation "
            "loss applies the head by itself. Take lm_head (and, with tied embeddings, embed_tokens) "
            "out of lora_target_modules / lora_modules_to_save."
        )


def _refuse_other_engine(asked: Engine, running: Engine) -> None:
    """Accelerate ignores what it cannot start, FSDP on a CPU for one."""
    if asked is not running:
        raise ConfigConflictError(
            f"the config asks for {asked.value}, but {running.value} has been started. {asked.value} "
            "needs an accelerator and a launcher that starts it (axolotl train's own), and on a CPU no "
            "ACCELERATE_USE_CPU; otherwise remove deepspeed: and fsdp_config:."
        )


def _refuse_lonely_ranks(trainer: DistillationTrainer) -> None:
    """Several launched ranks of which each believes to be the only one would train apart."""
    launched, seen = num_launched(), trainer.accelerator.num_processes
    if launched != seen:
        raise ConfigConflictError(
            f"{launched} ranks were launched, but each sees {seen}: they would train independently "
            "of each other. On CPU ranks set ACCELERATE_USE_CPU=true in the environment; under srun or "
            "mpirun launch torchrun, once per machine; otherwise check the launcher and its rendezvous."
        )


def _take_one_gpu(trainer: DistillationTrainer, teacher: TeacherConfig) -> None:
    """A process that sees several GPUs trains on one, if the teacher has a use for the others."""
    count = trainer.args.n_gpu
    if count <= 1:
        return
    if not (teacher.device or teacher.device_map):
        raise ConfigConflictError(
            f"one process sees {count} GPUs, which makes torch's DataParallel of it. Use one process "
            "per GPU (axolotl train's default launcher), or set CUDA_VISIBLE_DEVICES; or give the "
            "others to the teacher: distillation.teacher.device or device_map."
        )
    # As transformers does with a model that lies on several devices itself.
    trainer.args._n_gpu = 1
    trainer._train_batch_size = trainer.args.train_batch_size
