"""The completion source that a config asks for, on a trainer and its models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from axolotl_skd.callbacks import TopKStateCallback
from axolotl_skd.config import Distillation
from axolotl_skd.config_blocks import TopKTarget
from axolotl_skd.methods import Share
from axolotl_skd.rollout.acceptance import ACCEPTANCE_RULES
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.sampling import GREEDY, row_streams
from axolotl_skd.rollout.stop_strings import StopStrings
from axolotl_skd.rollout.types import SamplingParams, Source
from axolotl_skd.sharding import AtHand
from axolotl_skd.sources import CompletionSource, DatasetSource, RolloutSource
from axolotl_skd.teacher_sequences import (
    Request,
    StoredSequences,
    fingerprint,
    make_sequences,
    sequence_folder,
)
from axolotl_skd.top_k import ScheduledTopK, TargetAcceptance, TopKPolicy
from axolotl_skd.trainer import DistillationTrainer


def completion_source(
    trainer: DistillationTrainer,
    distillation: Distillation,
    params: SamplingParams,
    student: CausalLM,
    teacher: CausalLM | None,
    weights: AtHand,
    seed: int,
    prepared_path: Path,
) -> CompletionSource:
    """The source, ready to be asked; `seqkd`'s has all its sequences by then.

    Args:
        trainer: fresh from Axolotl's builder.
        distillation: the typed config block.
        params: how to sample.
        student, teacher: views of both models.
        weights: contexts that they need; `teacher` is entered.
        seed: of the keyed random numbers.
        prepared_path: Axolotl's folder of prepared data, where teacher sequences are kept.

    Raises:
        teacher_sequences.MissingSequencesError
    """
    method = distillation.method_row
    if not method.rolls_out:
        return DatasetSource(seed)
    engine = RolloutEngine(
        student,
        teacher,
        accept=ACCEPTANCE_RULES[distillation.rollout.acceptance],
        stop_strings=StopStrings.of(distillation.rollout.stop_strings, trainer.processing_class),
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
        sample = _stored_sequences(
            trainer, distillation, params, engine, weights, seed, prepared_path
        )
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
        skip_non_finite=distillation.on_non_finite == "skip",
        describe=trainer.start_of,
        asking=weights.asking if method.source is Source.INTERLEAVED else nullcontext,
    )


def _stored_sequences(
    trainer: DistillationTrainer,
    distillation: Distillation,
    params: SamplingParams,
    engine: RolloutEngine,
    weights: AtHand,
    seed: int,
    prepared_path: Path,
) -> StoredSequences:
    """The teacher's completions of the whole training set, made where they are not there yet."""
    rollout, greedy = distillation.rollout, distillation.seqkd.decoding == "greedy"
    if greedy:
        params = replace(params, teacher_temperature=1.0, teacher_top_p=GREEDY)
    accelerator, args = trainer.accelerator, trainer.args
    settings = {
        "teacher": fingerprint(engine.teacher.model, weights.whole),
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
            skip_non_finite=distillation.on_non_finite == "skip",
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
            asking=weights.asking,
        )
    return StoredSequences(sequences)


def _requests(trainer: DistillationTrainer, seed: int, num_rollouts: int) -> Iterator[Request]:
    """A sequence per row of the training set and rollout, as `RolloutSource` will ask for them."""
    for row in trainer.train_dataset:
        batch = trainer.train_data_collator([row])
        prompt = batch["input_ids"][0, : int(batch["prompt_lengths"])]
        for index in range(num_rollouts):
            stream = row_streams(seed, 0, batch["sample_ids"], index)
            sample = f"{int(batch['sample_ids'])} ({trainer.start_of(prompt)!r})"
            yield Request(prompt, int(stream), sample)


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


def _share(distillation: Distillation) -> Callable[[float], float]:
    """Probability that a sequence is rolled out, by the share of steps done."""
    rule = distillation.method_row.share
    if rule is Share.LATE:
        return lambda progress: float(progress >= distillation.switch_at)
    constant = {Share.ALL: 1.0, Share.HALF: 0.5, Share.LMBDA: distillation.lmbda}[rule]
    return lambda _progress: constant
