"""Ctrl-C: the step in progress is finished, a checkpoint written, and it is said how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from axolotl_skd.checkpoints import missing
from axolotl_skd.ranks import is_first_rank

LOG = get_logger(__name__)

# A terminal and a launcher may both pass on the same Ctrl-C.
_SAME_PRESS_SECONDS = 1.0

_ANNOUNCEMENT = (
    b"\nCtrl-C: training ends after the step in progress, with a checkpoint. "
    b"Press it again to end at once, without one.\n"
)
_ANNOUNCEMENT_OF_TORCHRUN = (
    b"torchrun kills its ranks if step and checkpoint take longer than 30 seconds, or than "
    b"TORCH_ELASTIC_SHUTDOWN_TIMEOUT.\n"
)


class Interruption(TrainerCallback):
    """Turns the first Ctrl-C into an orderly end of training.

    The second one does what Ctrl-C had done before (Axolotl's handler: save the weights as they are
    and exit).

    Attributes:
        stopped_at: the step after which training was ended, None if it was not.
    """

    def __init__(self, on_any_rank: Callable[[bool], bool]) -> None:
        """
        Args:
            on_any_rank: is it so on one of the ranks? Asked by all of them after every step, so that
                all end after the same one.
        """
        self.stopped_at: int | None = None
        self._on_any_rank = on_any_rank
        self._asked_at: float | None = None
        self._previous: Any = None
        self._process: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Signals belong to the main thread; Ray trains in another.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            before = signal.signal(signal.SIGINT, self._ask)
            self._previous = signal.SIG_DFL if before is None else before

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._on_any_rank(self._asked_at is not None) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
            # Nothing is over yet: no best model is to be taken in place of this one, and no checkpoint
            # removed for it.
            args.load_best_model_at_end, args.save_total_limit = False, None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An interrupted epoch ends as well, and would be evaluated and saved a second time."""
        if self.stopped_at is not None:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data: it ends when this process does
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if is_first_rank():
                # Not by a logger: the line that it interrupts may hold the logger's lock.
                os.write(2, _ANNOUNCEMENT)
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    os.write(2, _ANNOUNCEMENT_OF_TORCHRUN)
        elif now - self._asked_at > _SAME_PRESS_SECONDS:
            signal.signal(signal.SIGINT, self._previous)
            signal.raise_signal(signum)


def say_how_to_go_on(step: int, output_dir: str, config_path: str, only_model: bool) -> None:
    """Say what a run that was ended after a step leaves, and the command that continues it.

    Args:
        step: the last one.
        output_dir, config_path: of the run.
        only_model: was a checkpoint to have the weights alone?
    """
    if not is_first_rank():
        return
    checkpoint = os.path.join(output_dir, f"checkpoint-{step}")
    lacks = missing(Path(checkpoint), only_model)
    if lacks:
        LOG.warning(
            f"Ended by Ctrl-C after step {step}, but {checkpoint} is not whole ({', '.join(lacks)}). "
            f"In {output_dir} is the student as it is now; to go on from an earlier checkpoint, set "
            "auto_resume_from_checkpoints: true.",
            main_process_only=False,
        )
        return
    command = shlex.join(["axolotl", "train", config_path, "--resume-from-checkpoint", checkpoint])
    LOG.warning(
        f"Ended by Ctrl-C after step {step}. Saved: {checkpoint}, from which training can go on as if "
        f"it had not been interrupted, and in {output_dir} the student as it is now. To go on, with "
        f"the options of this run:\n"
        f"  {command}",
        main_process_only=False,  # which it is, but the process group that would know is gone
    )
