"""What a full disk may not stop, and what it must."""

from __future__ import annotations

import errno
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from axolotl_skd.full_disk import ForgivingCallbackHandler, ForgivingStream, survive_full_disk


class Fails(TrainerCallback):
    def __init__(self, number: int) -> None:
        self._error = OSError(number, "no room")

    def on_log(self, *args: Any, **_: Any) -> None:
        raise self._error

    on_save = on_log


class Counts(TrainerCallback):
    calls = 0

    def on_log(self, *args: Any, **_: Any) -> None:
        self.calls += 1


def handler(*callbacks: TrainerCallback, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back what is wrapped
    stock = CallbackHandler([DefaultFlowCallback(), *callbacks], None, None, None, None)
    trainer = SimpleNamespace(callback_handler=stock)
    survive_full_disk(trainer)
    return trainer.callback_handler


def call(handler: Any, event: str) -> TrainerControl:
    return handler.call_event(event, None, None, TrainerControl(should_log=True))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_callback_without_room_keeps_no_other_from_its_turn(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counts()
    full = handler(Fails(number), counts, monkeypatch=monkeypatch)
    with caplog.at_level(logging.WARNING, "axolotl_skd.full_disk"):
        for _ in range(3):
            assert call(full, "on_log").should_log
    assert counts.calls == 3
    assert [record.getMessage()[:18] for record in caplog.records] == ["Fails cannot write"]
    with pytest.raises(OSError, match="no room"):
        call(full, "on_save")


def test_the_list_of_callbacks_stays_the_one_that_others_hold() -> None:
    stock = CallbackHandler([DefaultFlowCallback()], None, None, None, None)
    forgiving = ForgivingCallbackHandler(stock)
    forgiving.add_callback(late := Counts())
    call(forgiving, "on_log")
    assert late in stock.callbacks and late.calls == 1


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="no room"):
        call(handler(Fails(errno.EIO), monkeypatch=monkeypatch), "on_log")


def test_a_stream_without_room_drops_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    with open("/dev/full", "wb", buffering=0) as full:
        text = SimpleNamespace(write=lambda x: full.write(x.encode()), flush=full.flush, other=3)
        stream = ForgivingStream(text, "sys.stdout")
        for _ in range(3):
            print("x", file=stream, flush=True)
        assert stream.other == 3
    assert capsys.readouterr().err.count("sys.stdout, or Axolotl's copy") == 1


def test_a_broken_stream_is_no_full_disk() -> None:
    with open("/dev/null", "w") as stream:
        pass
    with pytest.raises(ValueError, match="closed"):
        ForgivingStream(stream, "sys.stdout").write("x")
