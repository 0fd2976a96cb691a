"""Scores of the bundled evaluation in the trackers of the run: TensorBoard, wandb, MLflow, ...

Before training there is no tracker yet, and when the trained student has been evaluated they are
closed. So the scores before training are handed over when training begins, and those after it to the
run's own tracker callbacks, each reopened on the run that it logged to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from axolotl.utils.callbacks.swanlab import CustomSwanLabCallback
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import (
    CometCallback,
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from axolotl_skd.evaluation.results import TaskMetrics

LOG = get_logger(__name__)

# wandb, Comet and SwanLab keep the run open until the process ends; the others close it.
_OPEN = (WandbCallback, CometCallback, SwanLabCallback, CustomSwanLabCallback)
_CLOSED = (TensorBoardCallback, MLflowCallback, TrackioCallback)


class TrackedScores(TrainerCallback):
    """Hands the scores before and after training to the trackers of the run.

    They appear as `eval/<task>/<metric>`, before training at step 0 and after it at the last step. A
    tracker that fails costs a warning.

    Args:
        callbacks: the trainer's, as they are when training begins.
        start: gives the scores before training; called when it begins.
    """

    def __init__(
        self, callbacks: Sequence[TrainerCallback], start: Callable[[], TaskMetrics]
    ) -> None:
        self._callbacks = callbacks
        self._start = start
        self._trackers: list[TrainerCallback] = []
        self._run: dict[type[TrainerCallback], str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any
    ) -> None:
        self._args, self._state, self._control = args, state, control
        self._trackers = [item for item in self._callbacks if isinstance(item, _OPEN + _CLOSED)]
        self._callbacks = ()  # some of the others hold the trainer, and with it the models
        if not state.is_world_process_zero:
            return
        for tracker in self._trackers:
            with suppress(Exception):  # what is not known is said when it is needed
                self._run[type(tracker)] = _run_of(tracker)
        scores = self._start()
        if not scores:
            return
        before = copy.copy(state)
        before.global_step = 0  # also where a run is resumed
        for tracker in self._trackers:
            self._hand_over(tracker, scores, before)

    def log_end(self, scores: TaskMetrics) -> None:
        """Hand over the scores after training."""
        for tracker in self._trackers:
            self._hand_over(tracker, scores, self._state, reopen=True)

    def _hand_over(
        self,
        tracker: TrainerCallback,
        scores: TaskMetrics,
        state: TrainerState,
        reopen: bool = False,
    ) -> None:
        reopen = reopen and isinstance(tracker, _CLOSED)
        try:
            if reopen:
                self._reopen(tracker)
            tracker.on_log(self._args, state, self._control, logs=_flat(scores))
            if reopen:
                tracker.on_train_end(self._args, state, self._control)
        except Exception as error:  # the results are in the file, whatever a tracker does
            LOG.warning(
                "the evaluation's scores are not in %s: %s: %s",
                type(tracker).__name__.removesuffix("Callback"),
                type(error).__name__,
                error,
            )

    def _reopen(self, tracker: TrainerCallback) -> None:
        """Have a tracker go on with the run that it closed, where it would begin a new one."""
        if isinstance(tracker, MLflowCallback):
            import mlflow

            # Still open where the user opened it.
            if mlflow.active_run() is None:
                mlflow.start_run(run_id=self._run[type(tracker)])
        elif isinstance(tracker, TrackioCallback):
            self._args.run_name = self._run[type(tracker)]


def _run_of(tracker: TrainerCallback) -> str:
    """The name by which `TrackedScores._reopen` finds the run again; empty where none is needed."""
    if isinstance(tracker, MLflowCallback):
        import mlflow

        return mlflow.active_run().info.run_id
    if isinstance(tracker, TrackioCallback):
        from trackio import context_vars

        return context_vars.current_run.get().name
    return ""


def _flat(scores: TaskMetrics) -> dict[str, float]:
    """`eval_<task>/<metric>`, which most trackers turn into `eval/<task>/<metric>`."""
    return {
        f"eval_{task}/{metric}": value
        for task, metrics in scores.items()
        for metric, value in metrics.items()
    }
