"""The contenders of a whole training step: rollout, student forward and backward, loss, AdamW.

All of them train the same student with one optimizer whose learning rate is 0: the arithmetic of an
update without its effect, so that every step of every contender starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from algorithm1 import cached_rows
from engines import acceptance, new_engine
from harness import Facts
from models import Pair, left_padded
from on_policy import generate, positions_of
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments
from work import PUBLISHED_DRAFT, Draft, Work

from axolotl_skd.data import IGNORE_INDEX, pad_rows
from axolotl_skd.losses.divergences import forward_kl
from axolotl_skd.losses.objective import Objective
from axolotl_skd.memory import Forecast, forecast, step_shape
from axolotl_skd.methods import get_method
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.types import Source
from axolotl_skd.sources import Batch, RolloutSource
from axolotl_skd.trainer import DistillationCore, Distiller


@dataclass(frozen=True, slots=True)
class StepWork:
    """What every contender trains on.

    Attributes:
        work: models and prompts, all completions of one length.
        sample_ids: int64 [B], behind the prompts' random streams.
        seed: likewise.
        optimizer: of the student.
        teacher_calls: forwards of the teacher so far.
    """

    work: Work
    sample_ids: Tensor
    seed: int
    optimizer: torch.optim.Optimizer
    teacher_calls: TeacherCalls

    @property
    def pair(self) -> Pair:
        return self.work.pair

    @property
    def max_new(self) -> int:
        return int(self.work.prompts.max_new_tokens.max())

    def finish(self, loss: Tensor, after_rollout: int, tokens: int) -> Facts:
        """Update, and say what the step was.

        Args:
            loss: its value.
            after_rollout: `teacher_calls.count` when the rollout was done.
            tokens: completion tokens trained on.
        """
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": float(loss),
            "tokens": tokens,
            "teacher forwards after the rollout": self.teacher_calls.count - after_rollout,
        }


class TeacherCalls:
    """Counts forwards of a model's decoder."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.get_decoder().register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.count += 1


class OurStep:
    """The package's own source, trainer core and loss, driven as `axolotl train` drives them."""

    def __init__(
        self, step: StepWork, folder: str, method: str, rate: float | None, draft: Draft
    ) -> None:
        self._step = step
        self.optimizer = step.optimizer
        pair, params = step.pair, step.work.params(draft)
        self.engine = engine = new_engine(pair, acceptance(rate))
        source = get_method(method).source
        sample = engine.interleave if source is Source.INTERLEAVED else engine.sample_student
        self.trainer = _core(method)(
            model=pair.student,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=len(step.sample_ids),
                gradient_checkpointing=pair.student.is_gradient_checkpointing,
                report_to=[],
                use_cpu=pair.device.type == "cpu",
            ),
        )
        self.trainer.state.max_steps = 1
        self.trainer.attach(
            Distiller(
                source=RolloutSource(
                    sample,
                    source,
                    params,
                    share=lambda _progress: 1.0,
                    max_new_tokens=step.max_new,
                    seed=step.seed,
                    pad_token_id=0,
                    pad_to_multiple_of=None,
                ),
                student=engine.student,
                teacher=engine.teacher,
                objective=Objective(forward_kl),
                forecast=self._forecast(engine),
            )
        )

    def _forecast(self, engine: RolloutEngine) -> Forecast:
        step = self._step
        shape = step_shape(
            self.trainer.args,
            source=Source.INTERLEAVED,
            data_tokens=0,
            prompt_tokens=max(map(len, step.work.prompts.ids)),
            new_tokens=step.max_new,
            rollout_batch_size=None,
            num_rollouts=1,
            activation_bytes=step.pair.student.dtype.itemsize,
        )
        return forecast(engine.student, engine.teacher, shape)

    def rollout(self) -> tuple[Batch, Tensor | int | None]:
        """One completed batch and the number of tokens in it."""
        step = self._step
        rows = list(step.work.prompts.ids)
        lengths = [len(row) for row in rows]
        batch = {
            **pad_rows(rows, lengths, 0, None),
            "prompt_lengths": torch.tensor(lengths),
            "sample_ids": step.sample_ids,
        }
        batches, count = self.trainer.get_batch_samples(iter([batch]), 1, step.pair.device)
        return batches[0], count

    def run(self) -> Facts:
        batch, count = self.rollout()
        calls = self._step.teacher_calls.count
        loss = self.trainer.training_step(self.trainer.model, batch, count)
        return self._step.finish(loss, calls, int((batch["labels"] != IGNORE_INDEX).sum()))


def _core(method: str) -> type[DistillationCore]:
    """The trainer type of a method without Axolotl's half, which needs a configuration."""
    return type("Core", (DistillationCore,), {"method": get_method(method)})


@contextmanager
def our_step(step: StepWork, method: str, rate: float | None, draft: Draft) -> Iterator[OurStep]:
    with TemporaryDirectory() as folder:
        yield OurStep(step, folder, method, rate, draft)


def gkd_step(step: StepWork, trainer: Any) -> Callable[[], Facts]:
    """TRL's own training step (`gkd.gkd_trainer`)."""
    from gkd import gkd_inputs

    def run() -> Facts:
        calls = step.teacher_calls.count
        inputs = gkd_inputs(step.work.prompts, step.pair.device)
        loss = trainer.training_step(trainer.model, inputs)
        # It hands its samples back in the same dictionary.
        return step.finish(loss, calls, int((inputs["labels"] != IGNORE_INDEX).sum()))

    return run


def on_policy_step(step: StepWork) -> Callable[[], Facts]:
    """`generate`, the teacher's logits, the student's, the divergence between them."""

    def run() -> Facts:
        student = step.pair.student.eval()
        student.gradient_checkpointing_disable()  # in whose presence there would be no cache
        ids, mask, completions = generate(step.pair, step.work.prompts, step.work.params(1))
        student.gradient_checkpointing_enable()
        calls = step.teacher_calls.count
        return _train(step, ids, mask, completions, calls)

    return run


def published_step(step: StepWork, rate: float | None) -> Callable[[], Facts]:
    """Batch-1 cached speculation, then both models' full logits of the batch."""
    params = step.work.params(PUBLISHED_DRAFT)

    def run() -> Facts:
        step.pair.student.eval()
        completions = cached_rows(
            step.pair, step.work.prompts, params, PUBLISHED_DRAFT, acceptance(rate)
        )
        calls = step.teacher_calls.count
        rows = [
            torch.cat([prompt, torch.tensor(completion)])
            for prompt, completion in zip(step.work.prompts.ids, completions, strict=True)
        ]
        ids, mask = left_padded(rows, step.pair.device)
        return _train(step, ids, mask, completions, calls)

    return run


def _train(
    step: StepWork, ids: Tensor, mask: Tensor, completions: list[list[int]], calls: int
) -> Facts:
    """Forward, full-logits divergence over the completions, backward, update."""
    step.pair.student.train()
    loss = full_logits_loss(step.pair, ids, mask, step.max_new)
    loss.backward()
    return step.finish(loss.detach(), calls, sum(map(len, completions)))


def full_logits_loss(pair: Pair, ids: Tensor, mask: Tensor, num_last: int) -> Tensor:
    """Mean forward KL of the last `num_last` tokens of left-padded rows."""
    inputs = dict(
        input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    )
    with torch.no_grad():
        teacher = pair.teacher(**inputs).logits
    student = pair.student(**inputs).logits
    predicting = slice(-1 - num_last, -1)
    student_logprobs, teacher_logprobs = (
        functional.log_softmax(logits[:, predicting].float(), dim=-1)
        for logits in (student, teacher)
    )
    losses = functional.kl_div(
        student_logprobs, teacher_logprobs, reduction="none", log_target=True
    )
    return losses.sum(dim=-1).mean()
