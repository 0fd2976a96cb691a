"""The trainer types: ask the source for completions, the loss for a sum, normalise, log.

Axolotl's trainer keeps all that it does (schedulers, saving, token counts, logging); what
distillation changes lies *behind* it in the method resolution order, where Hugging Face's `Trainer`
would answer: `DistillationTrainer -> AxolotlTrainer -> ... -> DistillationCore -> Trainer`.

Legend: B rows, L padded length, N completion tokens of a micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from axolotl.core.trainers import AxolotlTrainer
from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from axolotl_skd.checkpoints import STATE_FILE
from axolotl_skd.cpu import on_cpu
from axolotl_skd.data import IGNORE_INDEX, SAMPLE_ID_COLUMN
from axolotl_skd.losses.fused import TeacherTargets, chunk_size, fused_token_loss
from axolotl_skd.losses.objective import Objective, Tokens
from axolotl_skd.memory import GIB, Forecast, PeakMemory, weight_bytes
from axolotl_skd.methods import LossRecipe, Method, get_method
from axolotl_skd.metrics import SKIPPED_ROWS, Counters
from axolotl_skd.rollout.lm import GIVEN_TOKENS, CausalLM, rollout_mode
from axolotl_skd.rollout.sampling import Role, keyed_uniform
from axolotl_skd.rollout.types import Source
from axolotl_skd.sharding import AtHand
from axolotl_skd.sound_rows import rows_without_numbers
from axolotl_skd.sources import Batch, CompletionSource, StoredHidden

LOG = get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss that is not a number, before it could reach the weights."""


@dataclass(frozen=True, slots=True)
class Distiller:
    """All that the trainer needs beside the student it trains.

    Attributes:
        source: where completions come from.
        student: view of the unwrapped student.
        teacher: view of the frozen teacher, None for methods without one.
        objective: what is learned at a token.
        forecast: of the memory that a step needs.
        by_sequence: is the loss a mean over sequences (of their token means) instead of over tokens?
        skip_non_finite: leave rows out of the loss for which the teacher gives no finite numbers?
        at_hand: contexts without which weights may be elsewhere.
    """

    source: CompletionSource
    student: CausalLM
    teacher: CausalLM | None
    objective: Objective
    forecast: Forecast
    by_sequence: bool = False
    skip_non_finite: bool = False
    at_hand: AtHand = field(default_factory=AtHand)


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside an unwrapped student, below PEFT's wrapper (its layers stay in place)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class DistillationCore(Trainer):
    """What distillation puts in the place of Hugging Face's own loss, batches and evaluation."""

    method: Method
    distiller: Distiller | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """With DeepSpeed accelerate counts ranks by their GPUs: CPU ranks it is told of before."""
        if self.args.deepspeed and on_cpu():
            PartialState(cpu=True)
        super().create_accelerator_and_postprocess()

    def attach(self, distiller: Distiller) -> None:
        """Hand over models and source; must come before training or evaluation."""
        self.distiller = distiller
        self.counters = Counters()
        models = {lm.model: lm for lm in (distiller.student, distiller.teacher) if lm is not None}
        loaded = sum(map(weight_bytes, models.values()))
        self._peak_memory = PeakMemory(distiller.student.device, loaded)
        # Losses arrive normalised by the window's tokens: no second division by accumulation steps.
        # Axolotl's constructor turns this off, so it is set after it.
        self.model_accepts_loss_kwargs = True

    # Batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The micro-batches of one optimizer step, completed with the weights of this moment.

        Written anew rather than calling super, which counts the data set's tokens; what counts is
        what was rolled out.
        """
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if batches:
            batches, metrics = self._complete(batches)
            self.counters.add(metrics)
            if self._attached().skip_non_finite:
                num_unsampled, _ = metrics.get(SKIPPED_ROWS, (0, 0))
                batches = self._skip_bad_rows(batches, num_unsampled)
        return batches, self._num_items(batches, device)

    def _skip_bad_rows(self, batches: list[Batch], num_unsampled: float) -> list[Batch]:
        """Take out of a window the rows for which the teacher has no numbers.

        Before its tokens are counted, so they are no part of the mean. The teacher's states are kept
        for the loss.

        Args:
            batches: completed.
            num_unsampled: rows that a rollout has taken out already.

        Raises:
            NonFiniteLossError: no row would be left on any rank.
        """
        num_bad = 0
        if self.method.loss is not LossRecipe.CROSS_ENTROPY:
            judged = [self._without_bad_rows(batch) for batch in batches]
            batches, num_bad = [batch for batch, _ in judged], sum(bad for _, bad in judged)
        self.counters.add({SKIPPED_ROWS: (num_bad, 1 / self.accelerator.num_processes)})
        left = sum(int(self._items_by_row(batch["labels"]).sum()) for batch in batches)
        totals = torch.tensor([left, num_unsampled + num_bad], device=self.accelerator.device)
        left, skipped = self._reduce_sum(totals).tolist()
        if skipped and not left:
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: all that could be trained on was skipped "
                f"({skipped:.0f} rows, named above) since its numbers are not finite. The weights were "
                "not updated by it. A checkpoint or its dtype is broken (distillation.teacher.dtype), "
                "or the student diverged: lower learning_rate."
            )
        return batches

    def _without_bad_rows(self, batch: Batch) -> tuple[Batch, int]:
        """A batch with the bad rows masked, and their number."""
        labels = batch["labels"]
        predicted = labels[:, 1:] != IGNORE_INDEX
        targets, rows = self._teacher_targets(batch, predicted), predicted.nonzero()[:, 0]
        chunk = chunk_size(self._attached().student.vocab_size)
        bad = rows_without_numbers(targets, rows, chunk)
        sound = predicted.any(dim=1)
        sound[bad] = False
        if len(bad):
            LOG.warning(
                "step %d: skipped, since the teacher's logits are not finite: sample(s) %s",
                self.state.global_step + 1,
                self._named(batch, bad),
                main_process_only=False,
            )
            labels = labels.clone()
            labels[bad] = IGNORE_INDEX
        states = targets.hidden[sound[rows].to(targets.hidden.device)]
        stored = StoredHidden(states, sound.cpu())
        return {**batch, "labels": labels, "stored_hidden": stored}, len(bad)

    def _num_items(self, batches: list[Batch], device: torch.device) -> Tensor | None:
        """What the loss of a window is divided by: its tokens or sequences, over all ranks."""
        if not batches:
            return None
        counts = torch.stack([self._items_by_row(batch["labels"]).sum() for batch in batches])
        return self._reduce_sum(counts.sum().to(device))

    def _items_by_row(self, labels: Tensor) -> Tensor:
        """Tokens that are trained on, or whether there are any, int64 [B]."""
        # The state at position t predicts token t + 1, so the first position is never predicted.
        tokens = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
        return tokens.clamp(max=1) if self._attached().by_sequence else tokens

    def _complete(self, batches: list[Batch]) -> tuple[list[Batch], dict[str, Any]]:
        distiller = self._attached()
        epoch = int(self.state.epoch or 0)
        progress = self.state.global_step / self.state.max_steps
        if not self.method.rolls_out:
            return distiller.source.complete(batches, epoch, progress)
        at_hand, is_asked = distiller.at_hand, self.method.source is Source.INTERLEAVED
        # One autocast context around all of it: weights are cast once a rollout, and CUDA graphs may
        # rely on the casts, which die with the outermost context.
        with (
            rollout_mode(distiller.student.model),
            at_hand.student(),
            at_hand.teacher() if is_asked else nullcontext(),
            distiller.student.precision(),
        ):
            return distiller.source.complete(batches, epoch, progress)

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hugging Face's forward and backward of a micro-batch, with the weights they need."""
        with self._attached().at_hand.micro_batch():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Sum of losses / tokens or sequences of the window over all ranks.

        Scaled for the averaging of gradients. A window in which nothing is trained on gives zero.

        Args:
            model: the wrapped student; its forward is the one that syncs gradients.
            inputs: a batch of the source.
            return_outputs: also return {"losses": per token [N]}.
            num_items_in_batch: of the window over all ranks (`_num_items`); default this batch's.
        """
        total, losses, _ = self._token_losses(model, inputs)
        items = num_items_in_batch
        if items is None:
            items = self._items_by_row(inputs["labels"]).sum()
        loss = total / torch.as_tensor(items, device=total.device).clamp(min=1)
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks, while `items` counts those of all ranks.
            loss = loss * self.accelerator.num_processes
        return (loss, {"losses": losses}) if return_outputs else loss

    def _token_losses(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sum (with gradient), losses [N] (without), row of each token int64 [N]."""
        distiller = self._attached()
        predicted = inputs["labels"][:, 1:] != IGNORE_INDEX
        states = distiller.student.wrapped_states(
            model, inputs["input_ids"], inputs["attention_mask"]
        )
        hidden = states[:, :-1][predicted]
        tokens = self._tokens(inputs, predicted)
        recipe = distiller.objective.recipe(tokens, self._teacher_logits(inputs, predicted))
        with distiller.at_hand.heads():
            total, losses = fused_token_loss(
                hidden,
                distiller.student.logits,
                distiller.student.head_module,
                *recipe,
                chunk_size(distiller.student.vocab_size),
            )
        if distiller.objective.gate is not None and torch.is_grad_enabled():
            accepted = (int(tokens.accepted.sum()), len(losses))
            self.counters.add({"gate/token_acceptance_rate": accepted})
        rows = predicted.nonzero()[:, 0]
        if not losses.isfinite().all():
            raise self._non_finite(losses, hidden, rows, inputs)
        return total, losses, rows

    def _tokens(self, inputs: Batch, predicted: Tensor) -> Tokens:
        """What the loss may ask of this batch's tokens."""
        rows, columns = predicted.nonzero().unbind(dim=1)
        # Validation has no streams: a row's random numbers are the same each time.
        streams = inputs.get("streams", inputs["sample_ids"])
        rolled_out = inputs.get("rolled_out")
        from_data = torch.ones_like(rows, dtype=torch.bool)
        if rolled_out is not None:
            from_data = ~rolled_out.to(rows.device)[rows]
        weights = None
        if self._attached().by_sequence:
            weights = predicted.sum(dim=1).clamp(min=1).reciprocal()[rows]
        return Tokens(
            ids=inputs["labels"][:, 1:][predicted],
            from_data=from_data,
            uniforms=keyed_uniform(streams[rows], columns + 1, Role.GATE),
            accepted=torch.empty_like(rows, dtype=torch.bool),
            weights=weights,
        )

    def _teacher_logits(self, inputs: Batch, predicted: Tensor) -> Callable[[slice], Tensor] | None:
        """Of a chunk of the batch's tokens, where the student is; None if the loss needs none."""
        if self.method.loss is LossRecipe.CROSS_ENTROPY:
            return None
        targets = self._teacher_targets(inputs, predicted)
        return lambda part: targets.logits(part).to(predicted.device)

    def _teacher_targets(self, inputs: Batch, predicted: Tensor) -> TeacherTargets:
        """Stored at verification; where it was not, from one forward without gradient."""
        teacher = self._attached().teacher
        stored = inputs.get("stored_hidden")
        needed = predicted.any(dim=1).cpu()
        missing = needed if stored is None else needed & ~stored.rows
        asked = torch.empty(0, teacher.state_size, device=teacher.device)
        # Together, or not at all: where weights are spread, no rank can ask the teacher alone.
        if self._attached().at_hand.on_any_rank(bool(missing.any())):
            at_hand = self._attached().at_hand
            with at_hand.teacher(), at_hand.asking():
                asked = self._teacher_hidden(inputs, predicted, missing)
        if stored is None:
            return TeacherTargets(asked, teacher.logits)
        if not missing.any():
            return TeacherTargets(stored.states, teacher.logits)
        # Rows of both kinds: each token's state to its place, row by row.
        hidden = stored.states.new_empty(int(predicted.sum()), stored.states.shape[1])
        verified = stored.rows.to(predicted.device)[predicted.nonzero()[:, 0]].to(hidden.device)
        hidden[verified] = stored.states
        hidden[~verified] = asked
        return TeacherTargets(hidden, teacher.logits)

    @torch.no_grad()
    def _teacher_hidden(self, inputs: Batch, predicted: Tensor, rows: Tensor) -> Tensor:
        """The teacher's states [n, H] that predict the tokens of some rows (bool [B] on the CPU).

        Some rows at a time: at no time are there states of more than `GIVEN_TOKENS` positions, or one
        row's, beside those that are kept.
        """
        teacher, width = self._attached().teacher, inputs["input_ids"].shape[1]
        names = ("input_ids", "attention_mask")
        kept = []
        for part in rows.nonzero()[:, 0].split(max(1, GIVEN_TOKENS // width)):
            if len(part) == 0:  # of no rows at all
                return torch.empty(0, teacher.state_size, device=teacher.device)
            ids, mask = (inputs[name][part.to(predicted.device)] for name in names)
            hidden = teacher.hidden_states(ids.to(teacher.device), mask.to(teacher.device))
            kept.append(hidden[:, :-1][predicted[part.to(predicted.device)].to(teacher.device)])
        return torch.cat(kept)

    def _non_finite(
        self, losses: Tensor, hidden: Tensor, rows: Tensor, inputs: Batch
    ) -> NonFiniteLossError:
        """What is wrong, where, with whom.

        Args:
            losses: [N], some of them not finite.
            hidden: the student's states [N, H].
            rows: of each token, int64 [N].
            inputs: the batch.
        """
        bad, training = ~losses.isfinite(), torch.is_grad_enabled()
        where = f"step {self.state.global_step + 1}" if training else "validation"
        if not hidden[bad].isfinite().all():
            whose = "The student's own states are not: it diverged."
        elif self.method.loss is LossRecipe.CROSS_ENTROPY:
            whose = "The student's states are, so its logits are not."
        else:
            whose = (
                "The student's states are, so the teacher's logits are not, or the distance between "
                "both."
            )
            if training and not self._attached().skip_non_finite:
                whose += (
                    " Training rows of which the teacher makes no numbers can be left out: "
                    "distillation.on_non_finite: skip."
                )
        if not training:
            whose += " Validation leaves nothing out: remove these rows, or mend the model."
        return NonFiniteLossError(
            f"{where}: the loss of {int(bad.sum())} of {len(losses)} tokens is not finite, in "
            f"sample(s) {self._named(inputs, rows[bad].unique())}. {whose} The weights were not "
            "updated by it. Look at these rows; a lower learning_rate, bf16 instead of fp16 or a "
            "float32 teacher (distillation.teacher.dtype) are the usual remedies."
        )

    def _named(self, inputs: Batch, rows: Tensor) -> str:
        """Some rows of a batch, for people."""
        named = (
            f"{int(inputs['sample_ids'][row])} "
            f"({self.start_of(inputs['input_ids'][row, : int(inputs['prompt_lengths'][row])])!r})"
            for row in rows.tolist()
        )
        return ", ".join(named)

    def start_of(self, prompt: Tensor, num_tokens: int = 24) -> str:
        """The text of a prompt's first tokens, for people."""
        return self.processing_class.decode(prompt[:num_tokens])

    # Checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        """The last file but `trainer_state.json`, which is not to come before any rank's share."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Hugging Face's loop, with one mean over set and ranks in place of its mean of means."""
        self._eval_totals = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        total, items = self._eval_totals.tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        if items:
            output.metrics[f"{prefix}_loss"] = total / items
        return output

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The training loss on the data set's own completions, on the training scale."""
        inputs = self._prepare_inputs(inputs)
        total, losses, rows = self._token_losses(model, inputs)
        items = self._items_by_row(inputs["labels"])
        sums = torch.stack([torch.zeros_like(items), items], dim=1).double()
        sums[:, 0].index_add_(0, rows, losses.double())
        # Row by row, since the last batch repeats rows to fill all ranks and those are cut here.
        self._eval_totals += self.accelerator.gather_for_metrics(sums).sum(dim=0).cpu()
        return total / items.sum().clamp(min=1), None, None

    # Logs and columns

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the counters to training lines; drop `ppl`, which is exp(loss), of a divergence."""
        if self.method.loss is LossRecipe.DIVERGENCE:
            logs.pop("ppl", None)
            logs.pop("eval_ppl", None)
        if "loss" in logs:
            logs.update(self.counters.pop(self._reduce_sum, self.accelerator.device))
            logs["memory/peak_gib"] = self._largest(self._peak_memory.read()) / GIB
            logs["memory/predicted_gib"] = self._attached().forecast.peak / GIB
        super().log(logs, *args, **kwargs)

    def on_any_rank(self, here: bool) -> bool:
        """Is it so on one of the ranks? To be asked by all of them."""
        if self.accelerator.num_processes == 1:
            return here  # without waiting for the device
        return bool(self._reduce_sum(torch.tensor(int(here), device=self.accelerator.device)))

    def _largest(self, here: int) -> int:
        """Over the ranks."""
        if self.accelerator.num_processes == 1:
            return here
        return int(
            self.accelerator.gather(torch.tensor([here], device=self.accelerator.device)).max()
        )

    def _reduce_sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE_ID_COLUMN not in self._signature_columns:
            self._signature_columns += [SAMPLE_ID_COLUMN]

    def _attached(self) -> Distiller:
        if self.distiller is None:
            raise RuntimeError(
                "the distillation trainer was never given its teacher and source: the plugin's "
                "post_trainer_create hook did not run. Launch through `axolotl train`."
            )
        return self.distiller


class DistillationTrainer(AxolotlTrainer, DistillationCore):
    """Axolotl's causal trainer with distillation behind it."""

    _saved_step: int | None = None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """What is there of the same step, half-written or of an earlier run, goes first.

        Before Axolotl's own, which writes into the folder on every rank. What this very run has saved
        of the step stays: at no time is there less than before.
        """
        step = self.state.global_step
        if step == self._saved_step:
            return
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            (folder / STATE_FILE).unlink(missing_ok=True)  # at no time does it look whole
            if folder.exists():
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(*args, **kwargs)
        self._saved_step = step


@cache
def trainer_type(method_name: str) -> type[DistillationTrainer]:
    """The trainer type of a method, e.g. `SkdTrainer`."""
    name = "".join(part.capitalize() for part in method_name.split("_")) + "Trainer"
    return type(name, (DistillationTrainer,), {"method": get_method(method_name)})
