"""The process that grades: its life, and that it harms nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from axolotl_skd.evaluation import grading_process
from axolotl_skd.evaluation.grading import grade
from axolotl_skd.evaluation.grading_process import GradingProcess, GradingUnavailableError

SLOW = "(x+y+z+w)^{900}"


@pytest.fixture
def process() -> Iterator[GradingProcess]:
    process = GradingProcess()
    yield process
    process.close()


@pytest.fixture
def hurried() -> Iterator[GradingProcess]:
    process = GradingProcess(seconds=0.5)
    yield process
    process.close()


def pid(process: GradingProcess) -> int:
    assert process._child is not None
    return process._child.pid


def is_alive(pid: int) -> bool:
    """Whether there is such a process, a zombie included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def worker_of(child: int) -> int:
    """The worker that the child forked."""
    (worker,) = psutil.Process(child).children()
    return worker.pid


def test_it_starts_with_the_first_pair_and_stays(process: GradingProcess) -> None:
    assert process._child is None
    assert process.equivalent("2x", "x+x") is True
    first = pid(process)
    assert process.equivalent("2x", "x") is False
    assert pid(process) == first


def test_after_a_hang_it_goes_on_and_leaves_no_zombie(hurried: GradingProcess) -> None:
    hurried.equivalent("x", "x+0")
    child = pid(hurried)
    worker = worker_of(child)
    assert hurried.equivalent("x+y", SLOW) is None
    assert hurried.equivalent("2x", "x+x") is True
    assert pid(hurried) == child
    assert not is_alive(worker)


def test_one_that_was_killed_is_replaced(process: GradingProcess) -> None:
    process.equivalent("x", "x+0")
    worker = worker_of(pid(process))
    os.kill(pid(process), signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    # Whether it is found dead before or after the question is a matter of timing.
    assert True in {process.equivalent("2x", "x+x") for _ in range(2)}


def test_closing_ends_it(process: GradingProcess) -> None:
    process.equivalent("x", "x+0")
    child = pid(process)
    worker = worker_of(child)
    process.close()
    assert not is_alive(child) and not is_alive(worker)
    process.close()


def test_awkward_text_comes_through(process: GradingProcess) -> None:
    for text in ("a\nb", "\x00", "\ud800", "ü\u2028", '"]\n["1", "1"]'):
        assert process.equivalent("5", text) is False
    assert process.equivalent("2x", "x+x") is True


def test_threads_share_one(process: GradingProcess) -> None:
    wrong: list[int] = []

    def ask(n: int) -> None:
        for k in range(10):
            if process.equivalent(f"{n}x", f"{k}x") is not (n == k):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def graded(pair: tuple[str, str]) -> tuple[bool, int]:
    """The verdict, and the process that was asked for it."""
    return grade(*pair), pid(grading_process.SHARED)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_have_their_own(method: str) -> None:
    parent = graded(("2x", "x+x"))[1]
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map(graded, [("2x", "x+x"), ("3x", "x+x")] * 5, chunksize=1)
    assert [verdict for verdict, _ in results] == [True, False] * 5
    assert parent not in {child for _, child in results}
    assert graded(("4x", "2x+2x")) == (True, parent)


def test_a_fork_while_a_pair_is_graded_does_not_wait_for_it() -> None:
    with grading_process.SHARED._lock:
        forked = multiprocessing.get_context("fork").Process(target=grade, args=("2x", "x+x"))
        forked.start()
    forked.join(timeout=20)
    finished = forked.exitcode == 0
    forked.kill()
    assert finished


def test_a_script_without_a_main_guard_may_grade(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from axolotl_skd.evaluation.grading import grade\n"
        "from axolotl_skd.evaluation.grading_process import SHARED\n"
        "print(grade('2x', 'x+x'), SHARED._child.pid)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=environment
    )
    verdict, child = done.stdout.split()
    assert verdict == "True" and done.stderr == ""
    assert not is_alive(int(child))


def test_a_missing_math_verify_is_an_error_and_no_verdict(
    process: GradingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradingUnavailableError, match=r"pip install .*axolotl-skd\[eval\]"):
        process.equivalent("2x", "x+x")


def test_a_child_that_cannot_start_is_an_error_and_no_verdict(
    process: GradingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading_process, "_CHILD", "raise SystemExit(3)")
    with pytest.raises(GradingUnavailableError, match="exit code 3"):
        process.equivalent("2x", "x+x")
    assert process._child is None
