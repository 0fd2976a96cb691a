"""One rank of a run of several: trains configs one after another and leaves what came of it in files.

torchrun --nproc_per_node N -m tests.training.two_ranks CONFIGS_JSON OUTPUT_DIR

FAULT=fail, kill or ctrl_c in the environment happens to the last rank, in its second step's rollout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import axolotl.train
import axolotl.utils.distributed
import torch
from transformers import PreTrainedModel, TrainerCallback

from axolotl_skd.losses import fused
from axolotl_skd.sharding import layers_of
from tests.training.harness import DistillationTrainer, run_training, weights


def meet_fault() -> None:
    fault = os.environ.get("FAULT")
    if fault == "fail":
        raise RuntimeError("the last rank is out of luck")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "ctrl_c":
        os.kill(os.getpid(), signal.SIGINT)


class WeightsAfter(TrainerCallback):
    """The trained weights, taken while the ranks can still talk to each other."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_end(self, args, state, control, **_) -> None:
        with self._trainer.distiller.at_hand.student():
            self.weights = weights(self._trainer)


def watch_layers(model: PreTrainedModel) -> list[int]:
    """Grows by how many layers DeepSpeed has in one piece, in each forward of one."""
    layers, seen = layers_of(model), []

    def count(*_: object) -> None:
        seen.append(sum(next(layer.parameters()).numel() > 0 for layer in layers))

    for layer in layers:
        layer.register_forward_hook(count, prepend=True)
    return seen


def trained(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """What this rank saw of one training."""
    torch.manual_seed(0)  # adapters begin with random weights
    rows: dict[int, list[list[int]]] = {}
    after: list[WeightsAfter] = []
    whole_layers: list[list[int]] = []

    def watch(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        complete = source.complete

        def watched(batches, epoch, progress):
            index, count = trainer.args.process_index, trainer.accelerator.num_processes
            if trainer.state.global_step == 1 and index == count - 1:
                meet_fault()
            completed, metrics = complete(batches, epoch, progress)
            for batch in completed:
                for index, sample in enumerate(batch["sample_ids"].tolist()):
                    kept = batch["attention_mask"][index].bool()
                    rows.setdefault(sample, []).append(batch["input_ids"][index][kept].tolist())
            return completed, metrics

        source.complete = watched
        if trainer.distiller.teacher is not None:
            whole_layers.append(watch_layers(trainer.distiller.teacher.model))
        after.append(WeightsAfter(trainer))
        trainer.add_callback(after[0])

    trainer = run_training(config, output_dir, watch)
    return {
        "rows": rows,
        "weights": after[0].weights,
        "log": trainer.state.log_history,
        "whole_layers": max((max(seen, default=0) for seen in whole_layers), default=0),
        "steps": trainer.state.global_step,
        "processes": trainer.accelerator.num_processes,
        "stored": sum(p.numel() for p in trainer.model.parameters()),
    }


def main() -> None:
    configs, output_dir = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    # Several trainings in a process: DeepSpeed keeps to the first process group.
    axolotl.train.cleanup_distributed = lambda: None
    fused.CHUNK_ELEMENTS = 5 * 512  # so that ranks have unequal numbers of chunks
    for name, config in configs.items():
        folder = output_dir / name
        folder.mkdir(exist_ok=True)
        torch.save(trained(config, folder / "model"), folder / f"rank{rank}.pt")
        axolotl.utils.distributed.distributed_state = None


if __name__ == "__main__":
    main()
