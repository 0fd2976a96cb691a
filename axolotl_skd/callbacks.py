"""What is said once when training begins, and what outlives a checkpoint beside the weights."""

from __future__ import annotations

from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from axolotl_skd.top_k import TargetAcceptance

LOG = get_logger(__name__)


class StartLineCallback(TrainerCallback):
    """One line on what is about to be trained, when the final step count is known."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        LOG.info("distillation, %d steps: %s", state.max_steps, self.description)


class TopKStateCallback(TrainerCallback):
    """Keeps the state of the K controller in `trainer_state.json`, and takes it from there.

    Written at every step, before a checkpoint may be saved; JSON gives a float back as it was.
    """

    KEY = "axolotl_skd.teacher_top_k"

    def __init__(self, controller: TargetAcceptance) -> None:
        self._controller = controller

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(self.KEY)
        if saved is not None:
            self._controller.log_top_k = saved["attributes"]["log_top_k"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The form that transformers gives the states of callbacks.
        attributes = {"log_top_k": self._controller.log_top_k}
        state.stateful_callbacks[self.KEY] = {"args": {}, "attributes": attributes}
