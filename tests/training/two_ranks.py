"""One rank of a run of several: trains a config and leaves its rollouts and weights in files.

torchrun --nproc_per_node N tests/training/two_ranks.py CONFIG_JSON OUTPUT_DIR

FAULT=fail or FAULT=ctrl_c in the environment happens to the last rank, in its second step's rollout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from tests.training.harness import DistillationTrainer, run_training, weights


def meet_fault() -> None:
    fault = os.environ.get("FAULT")
    if fault == "fail":
        raise RuntimeError("the last rank is out of luck")
    if fault == "ctrl_c":
        os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    config, output_dir = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    rows: dict[int, list[list[int]]] = {}

    def watch(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        complete = source.complete

        def watched(batches, epoch, progress):
            if trainer.state.global_step == 1 and rank == int(os.environ["WORLD_SIZE"]) - 1:
                meet_fault()
            completed, metrics = complete(batches, epoch, progress)
            for batch in completed:
                for index, sample in enumerate(batch["sample_ids"].tolist()):
                    kept = batch["attention_mask"][index].bool()
                    rows.setdefault(sample, []).append(batch["input_ids"][index][kept].tolist())
            return completed, metrics

        source.complete = watched

    trainer = run_training(config, output_dir / f"rank{rank}", watch)
    torch.save(
        {
            "rows": rows,
            "weights": weights(trainer),
            "log": trainer.state.log_history,
            "steps": trainer.state.global_step,
            "processes": trainer.accelerator.num_processes,
        },
        output_dir / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main()
