"""One rank of a run of several: trains a config and leaves its rollouts and weights in files.

torchrun --nproc_per_node N tests/training/two_ranks.py CONFIG_JSON OUTPUT_DIR
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback

from tests.training.harness import DistillationTrainer, run_training, weights


def count_cpu_ranks() -> None:
    """With DeepSpeed accelerate sees one process per CPU rank, unless it was told of them before."""
    create = Trainer.create_accelerator_and_postprocess

    def counted(trainer: Trainer) -> None:
        PartialState(cpu=True)
        create(trainer)

    Trainer.create_accelerator_and_postprocess = counted


class WeightsAfter(TrainerCallback):
    """The trained weights, taken while the ranks can still talk to each other."""

    def on_train_end(self, args, state, control, **_) -> None:
        with self.trainer.distiller.at_hand.student():
            self.weights = weights(self.trainer)


def main() -> None:
    config, output_dir = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    if config.get("deepspeed"):
        count_cpu_ranks()
    rows: dict[int, list[list[int]]] = {}
    after = WeightsAfter()

    def watch(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        complete = source.complete

        def watched(batches, epoch, progress):
            completed, metrics = complete(batches, epoch, progress)
            for batch in completed:
                for index, sample in enumerate(batch["sample_ids"].tolist()):
                    kept = batch["attention_mask"][index].bool()
                    rows.setdefault(sample, []).append(batch["input_ids"][index][kept].tolist())
            return completed, metrics

        source.complete = watched
        after.trainer = trainer
        trainer.add_callback(after)

    trainer = run_training(config, output_dir / f"rank{rank}", watch)
    torch.save(
        {
            "rows": rows,
            "weights": after.weights,
            "log": trainer.state.log_history,
            "processes": trainer.accelerator.num_processes,
        },
        output_dir / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main()
