"""A full disk stops nothing that only reports: trackers, log files and the console.

What a run is for, checkpoints and the trained student, is not forgiven.
"""

from __future__ import annotations

import errno
import sys
from contextlib import suppress
from copy import copy
from typing import Any, TextIO

from axolotl.utils.logging import get_logger
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

LOG = get_logger(__name__)

# No space left, over quota, over the limit of a file's size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def survive_full_disk(trainer: Trainer) -> None:
    """Let a trainer's callbacks and this process's console fail for want of space."""
    trainer.callback_handler = ForgivingCallbackHandler(trainer.callback_handler)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, ForgivingStream):
            setattr(sys, name, ForgivingStream(stream, f"sys.{name}"))


class ForgivingCallbackHandler(CallbackHandler):
    """Calls each callback by itself: one that finds the disk full keeps no other from its turn."""

    def __init__(self, handler: CallbackHandler) -> None:
        """
        Args:
            handler: the trainer's, of which this one takes everything over, its list of callbacks too:
                others may hold it already.
        """
        vars(self).update(vars(handler))
        self._warned: set[str] = set()

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        for callback in list(self.callbacks):
            alone = copy(self)
            alone.callbacks = [callback]
            try:
                control = CallbackHandler.call_event(alone, event, args, state, control, **kwargs)
            except OSError as error:
                # What is written along with a checkpoint belongs to it.
                if error.errno not in _FULL or event == "on_save":
                    raise
                self._warn(type(callback).__name__, error)
        return control

    def _warn(self, name: str, error: OSError) -> None:
        if name not in self._warned:
            self._warned.add(name)
            LOG.warning(
                "%s cannot write (%s): training goes on, and what it logs from here may be lost. "
                "Free some space before the next checkpoint.",
                name,
                error,
                main_process_only=False,
            )


class ForgivingStream:
    """A text stream that drops what it has no room for, and says so once on the real stderr."""

    def __init__(self, stream: TextIO, name: str) -> None:
        """
        Args:
            stream: wrapped; Axolotl's own copies all that is written to a file.
            name: for the warning.
        """
        self._stream = stream
        self._name = name
        self._warned = False

    def write(self, text: str) -> int:
        self._forgive(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._forgive(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _forgive(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._warned:
                self._warned = True
                with suppress(OSError):
                    sys.__stderr__.write(
                        f"WARNING: {self._name}, or Axolotl's copy of it in debug.log, cannot be "
                        f"written ({error}): training goes on, and lines may be lost.\n"
                    )
