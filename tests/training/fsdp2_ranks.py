"""One rank of several whose student and teacher are spread by raw FSDP2, on CPUs.

torchrun --nproc_per_node N -m tests.training.fsdp2_ranks PAIR OUTPUT_DIR

Every rank also trains unspread copies on the rows of all ranks, to compare with. What accelerate does
around FSDP2 needs GPUs; here its own calls are made by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_skd.data import pad_rows
from axolotl_skd.losses.divergences import get_divergence
from axolotl_skd.losses.objective import Objective
from axolotl_skd.methods import get_method
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import probed_lm, rollout_mode
from axolotl_skd.rollout.types import SamplingParams, Source
from axolotl_skd.sharding import AtHand, fsdp2_at_hand, layers_of, spread_fsdp2
from axolotl_skd.sources import Batch, RolloutSource
from axolotl_skd.trainer import DistillationCore, Distiller

PARAMS = SamplingParams(
    num_draft_tokens=3,
    teacher_top_k=20,
    student_temperature=0.5,
    student_top_p=0.5,
    teacher_temperature=0.2,
    teacher_top_p=1.0,
    # Many, so that rows end at different lengths.
    stop_token_ids=tuple(range(20, 512, 8)),
)
# The student, and whether the teacher is gathered layer by layer.
CASES = (("student", False), ("student_untied", False), ("student_untied", True))
# Rows of the micro-batches of a window, by rank: their prompts' lengths.
WINDOW = (((5, 9, 3), (7,)), ((4,), (6, 2)))


def batch(lengths: tuple[int, ...], rank: int, step: int) -> Batch:
    """As collated: prompts of random tokens, each with a short completion of the data set's."""
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + sum(lengths))
    rows = [torch.randint(3, 512, (length + 4,), generator=generator) for length in lengths]
    ids = torch.tensor([hash((rank, step, length)) % 2**40 for length in lengths])
    padded = pad_rows(rows, lengths, 0, 8)
    return {**padded, "prompt_lengths": torch.tensor(lengths), "sample_ids": ids}


class _Core(DistillationCore):
    method = get_method("mixed_skd")


class Run:
    """A student in training, as far as this package is concerned with it."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, at_hand: AtHand, ranks: int
    ) -> None:
        """
        Args:
            student, teacher: spread, or not.
            at_hand: accordingly.
            ranks: over which gradients are averaged.
        """
        self.student, self.at_hand, self.ranks = student, at_hand, ranks
        with rollout_mode(student), at_hand.student(), at_hand.teacher():
            views = [probed_lm(student, "student"), probed_lm(teacher, "teacher")]
        # Half of the rows keep the data set's completions: the teacher is asked about those.
        self.source = RolloutSource(
            RolloutEngine(*views).interleave,
            Source.INTERLEAVED,
            PARAMS,
            share=lambda _progress: 0.5,
            max_new_tokens=12,
            seed=3,
            pad_token_id=0,
            pad_to_multiple_of=8,
            asking=at_hand.asking,
        )
        self.trainer = _Core.__new__(_Core)  # Hugging Face's own constructor would start an engine
        self.trainer.accelerator = SimpleNamespace(num_processes=ranks)
        objective = Objective(get_divergence("forward_kl", beta=0.5, alpha=0.1, temperature=1.0))
        self.trainer.distiller = Distiller(self.source, *views, objective, None, at_hand=at_hand)

    def complete(self, batches: list[Batch]) -> list[Batch]:
        with rollout_mode(self.student), self.at_hand.student(), self.at_hand.teacher():
            return self.source.complete(batches, epoch=0, progress=0.0)[0]

    def step(self, windows: list[list[Batch]], rate: float = 0.05) -> tuple[list[Any], float]:
        """A step of SGD on micro-batches of several ranks; tokens and sum of losses of these."""
        self.student.train()
        completed = [self.complete(window) for window in windows]
        tokens = [one["input_ids"].tolist() for window in completed for one in window]
        total = 0.0
        for inputs in (one for window in completed for one in window):
            loss = self.trainer.compute_loss(self.student, inputs, num_items_in_batch=20)
            loss.backward()
            total += loss.item() / self.ranks
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.sub_(rate * parameter.grad)
                parameter.grad = None
        return tokens, total

    def validation(self, inputs: Batch) -> float:
        self.student.eval()
        with torch.no_grad():
            return self.trainer.compute_loss(self.student, inputs).item()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def watch_layers(model: PreTrainedModel) -> list[int]:
    """Grows by how many layers are whole in each forward of one, those of tries at start included."""
    layers, seen = layers_of(model), []

    def count(*_: object) -> None:
        whole = [not isinstance(next(layer.parameters()), DTensor) for layer in layers]
        seen.append(sum(whole))

    for layer in layers:
        layer.register_forward_hook(count, prepend=True)
    return seen


def spread_run(pair: Path, name: str, by_layer: bool) -> tuple[Run, list[int]]:
    """Layers and root as accelerate wraps them; and `watch_layers` of the teacher."""
    student, teacher = load(pair / name), load(pair / "teacher").requires_grad_(False)
    whole_layers = watch_layers(teacher)
    spread_fsdp2(teacher)

    def on_any_rank(here: bool) -> bool:
        flag = torch.tensor(float(here))
        dist.all_reduce(flag)
        return bool(flag > 0)

    at_hand = fsdp2_at_hand(lambda: student, student, teacher, on_any_rank, by_layer, True)
    run = Run(student, teacher, at_hand, ranks=dist.get_world_size())  # the student is whole here
    for layer in student.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(student, reshard_after_forward=True)
    return run, whole_layers


def main() -> None:
    pair, output_dir = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name, by_layer in CASES:
        spread, whole_layers = spread_run(pair, name, by_layer)
        whole = Run(load(pair / name), load(pair / "teacher"), AtHand(), ranks=1)
        steps = []
        for step in range(3):
            windows = [
                [batch(lengths, one, step) for lengths in WINDOW[one]] for one in range(ranks)
            ]
            tokens, loss = spread.step([windows[rank]])
            expected, expected_loss = whole.step(windows)
            steps.append(
                {
                    "tokens": tokens,
                    "loss": loss,
                    "expected_tokens": expected,
                    "expected_loss": expected_loss,
                }
            )
        mine = batch((4, 3), rank, 9)
        found[name, by_layer] = {
            "whole_layers": max(whole_layers),
            "steps": steps,
            "validation": (spread.validation(mine), whole.validation(mine)),
            "elements": sum(p.to_local().numel() for p in spread.student.parameters()),
            "weights": {k: p.full_tensor().detach() for k, p in spread.student.named_parameters()},
            "expected": {k: p.detach() for k, p in whole.student.named_parameters()},
        }
    torch.save(found, output_dir / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
