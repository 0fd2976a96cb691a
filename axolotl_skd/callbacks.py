"""What is said once when training begins."""

from __future__ import annotations

from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

LOG = get_logger(__name__)


class StartLineCallback(TrainerCallback):
    """One line on what is about to be trained, when the final step count is known."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        LOG.info("distillation, %d steps: %s", state.max_steps, self.description)
