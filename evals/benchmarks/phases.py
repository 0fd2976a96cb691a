"""Where the time of one training step goes, by hand clocks around the seams of the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from steps import OurStep

from axolotl_skd import trainer as trainer_module
from axolotl_skd.rollout import flight as flight_module
from axolotl_skd.rollout import haste as haste_module

LOSS = "loss through the heads"


class PhaseClock:
    """Seconds by phase; a phase inside another is taken out of the outer one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    @property
    def current(self) -> str | None:
        """The innermost open phase."""
        return self._open[-1] if self._open else None

    def timing(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Any:
        """`function`, timed as `name` or as what `name` makes of its arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        return timed

    def _book(self) -> None:
        """Give the time since the last change to the innermost open phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            now = time.perf_counter()
        else:
            now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


def profile_step(step: OurStep, device: torch.device) -> dict[str, float]:
    """Seconds by phase of one step, the largest first."""
    clock = PhaseClock(device)
    trainer, distiller = step.trainer, step.trainer.distiller

    def head_of(role: str) -> Callable[..., str]:
        # Inside the loss the heads are part of the loss.
        return lambda _hidden: clock.current if clock.current == LOSS else f"rollout: {role} head"

    student, teacher = distiller.student, distiller.teacher
    timed = [
        (distiller.source, "complete", "rollout: bookkeeping"),
        (student, "prefill", "rollout: student prefill"),
        (teacher, "prefill", "rollout: teacher prefill"),
        (student, "forward", "rollout: student decoding"),
        (teacher, "forward", "rollout: teacher verification"),
        (student, "logits", head_of("student")),
        (teacher, "logits", head_of("teacher")),
        (step.engine, "_accept", "rollout: acceptance test"),
        (haste_module, "sample_top_p", "rollout: sampling"),
        (haste_module, "sample_from_shortlist", "rollout: sampling"),
        (flight_module, "keyed_uniform", "rollout: random numbers"),
        (student, "wrapped_states", "student forward"),
        (trainer_module, "fused_token_loss", LOSS),
        (trainer.accelerator, "backward", "student backward"),
        (step.optimizer, "step", "optimizer"),
    ]
    with ExitStack() as stack:
        for owner, attribute, name in timed:
            function = getattr(owner, attribute)
            stack.enter_context(patch.object(owner, attribute, clock.timing(name, function)))
        with clock.phase("rest"):
            step.run()
    return dict(sorted(clock.seconds.items(), key=lambda item: -item[1]))
