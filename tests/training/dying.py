"""Training runs that meet a fault, each in a process of its own.

The processes are forked from one that has done the slow imports.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.flight import Flight
from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import run_training, weights

# The third of six steps.
FATAL_STEP = 2

Action = Callable[[DistillationTrainer], None]


def run(
    config: dict[str, Any], folder: Path, fault: Callable[[], Action | None] | None = None
) -> tuple[int, str]:
    """Train in `folder`, where `result.pt` appears if training ends; returns exit code and output."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        child = context.Process(target=_train, args=(config, folder, fault))
        child.start()
        child.join(timeout=300)
    output = (folder / "output.txt").read_text()
    (folder / "output.txt").unlink()
    return child.exitcode, output


def _train(config: dict[str, Any], folder: Path, fault: Callable[[], Action | None] | None) -> None:
    torch.set_num_threads(1)
    with open(folder / "output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    steps: list[int] = []
    action = fault() if fault is not None else None

    def prepare(trainer: DistillationTrainer) -> None:
        trainer.add_callback(_Watch(steps))
        if action is not None:
            action(trainer)

    trainer = run_training(config, folder, prepare)
    result = {"weights": weights(trainer), "log": trainer.state.log_history, "steps": steps}
    torch.save(result, folder / "result.pt")


class _Watch(TrainerCallback):
    """Notes the steps that were made."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps.append(state.global_step)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Faults: each prepares the process, and may return what is to be done to the trainer.


def killed_in_rollout() -> Action:
    """After the first round of a rollout."""
    return lambda trainer: _in_rollout(trainer, die)


def ctrl_c_in_rollout() -> Action:
    return lambda trainer: _in_rollout(trainer, lambda: os.kill(os.getpid(), signal.SIGINT))


def _in_rollout(trainer: DistillationTrainer, action: Callable[[], None]) -> None:
    commit = Flight.commit

    def watched(self: Flight, *args: Any) -> Any:
        committed = commit(self, *args)
        if trainer.state.global_step == FATAL_STEP:
            Flight.commit = commit
            action()
        return committed

    Flight.commit = watched


def killed_in_backward() -> Action:
    def act(trainer: DistillationTrainer) -> None:
        layer = trainer.model.model.layers[0].mlp.up_proj.weight
        layer.register_hook(lambda _: die() if trainer.state.global_step == FATAL_STEP else None)

    return act


def killed_in_checkpoint() -> None:
    """Half of the optimizer is on disk, all of the weights are."""

    def half(path: str, content: bytes) -> None:
        Path(path).write_bytes(content[: len(content) // 2])
        die()

    _at_fatal_optimizer(half)


def killed_before_optimizer() -> None:
    """The weights are on disk, and nothing else yet."""
    _at_fatal_optimizer(lambda path, content: die())


def _at_fatal_optimizer(action: Callable[[str, bytes], None]) -> None:
    save = torch.save

    def watched(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if not str(path).endswith(f"checkpoint-{FATAL_STEP + 1}/optimizer.pt"):
            return save(state, path, *args, **kwargs)
        content = io.BytesIO()
        save(state, content)
        return action(path, content.getvalue())

    torch.save = watched


def killed_in_generation() -> None:
    """In the second batch of the teacher's sequences."""
    calls: list[int] = []
    sample, commit = RolloutEngine.sample_teacher, Flight.commit

    def counted(self: RolloutEngine, *args: Any) -> Any:
        calls.append(1)
        return sample(self, *args)

    def watched(self: Flight, *args: Any) -> Any:
        return die() if len(calls) == 2 else commit(self, *args)

    RolloutEngine.sample_teacher, Flight.commit = counted, watched


def full_disk() -> Action:
    """The kernel refuses whatever TensorBoard writes, and much is printed."""

    class FillDisk(TrainerCallback):
        def __init__(self, trainer: DistillationTrainer) -> None:
            self._callbacks = trainer.callback_handler.callbacks

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (board,) = [one for one in self._callbacks if isinstance(one, TensorBoardCallback)]
            writer = board.tb_writer.file_writer.event_writer._async_writer
            writer.flush()
            writer._writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print("more than is buffered " * 1000)

    return lambda trainer: trainer.add_callback(FillDisk(trainer))
