"""A process of its own for grading, which a hostile answer may hang or crash without harm.

The parent (`GradingProcess`) writes one JSON line per pair of answers to the child's standard input
and reads one back. The child is a fresh interpreter, no fork: it holds no model, and starts the same
from a script, a notebook or lm-eval. Once it has loaded all libraries it forks the worker that does
the grading, and whenever the worker dies another one, within milliseconds.

The worker has the kernel kill it when a pair takes too long: too much of the processor, or twice as
long by the clock, which only a machine with many times more work than cores makes the first to
strike. That works in any thread of the parent, inside C code, and with math-verify, whose own
time-outs do not.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading

SECONDS_PER_PAIR = 2.0
_SECONDS_TO_START = 120
_MEMORY_BYTES = 4 * 2**30
_READY = "ready\n"
_NO_VERDICT = "null\n"
# The parent's import path, as multiprocessing's spawn would hand it over.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from axolotl_skd.evaluation.grading_process import serve; serve(float(sys.argv[2]))"
)


class GradingUnavailableError(RuntimeError):
    """The grading process cannot start: what is missing and how to get it."""


class GradingProcess:
    """One persistent child that grades pairs, started at the first one.

    Safe to share between threads. A forked process starts a child of its own.

    Args:
        seconds: of processor time that one pair may take.
    """

    def __init__(self, seconds: float = SECONDS_PER_PAIR) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def equivalent(self, gold: str, prediction: str) -> bool | None:
        """The child's verdict; None where it failed, or had none in time.

        Raises:
            GradingUnavailableError: if the child cannot start.
        """
        with self._lock:
            line = _ask(self._started(), gold, prediction)
            if line is None:
                self._stop()
            return None if line is None else json.loads(line)

    def close(self) -> None:
        """End the child, if there is one. The next pair starts another."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leave the child to the process that started it; for a fork."""
        self._lock, self._child = threading.Lock(), None

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._stop()
            self._child = _start(self._seconds)
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(OSError):
            child.stdin.close()  # ends the worker, and with it the child
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        child.kill()
        child.wait()
        child.stdout.close()


def _start(seconds: float) -> subprocess.Popen[str]:
    if importlib.util.find_spec("math_verify") is None:
        raise GradingUnavailableError(
            "grading answers needs math-verify, which is not installed: pip install "
            "'axolotl-skd[eval]', or 'math-verify[antlr4_13_2]>=0.9'"
        )
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogatepass",
    )
    if child.stdout.readline() != _READY:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
        raise GradingUnavailableError(
            f"the grading process ended with exit code {child.returncode} while starting; its "
            "error is above. To see it alone: "
            "python -c 'import axolotl_skd.evaluation.answers.equivalence, math_verify'"
        )
    return child


def _ask(child: subprocess.Popen[str], gold: str, prediction: str) -> str | None:
    """The line that the child answers; None if it ended instead."""
    try:
        child.stdin.write(json.dumps([gold, prediction]) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except OSError:
        return None
    return line if line.endswith("\n") else None


def serve(seconds: float) -> None:
    """The child: answer pairs from standard input until it is closed; `seconds` for each."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process
    signal.alarm(_SECONDS_TO_START)
    _limit_memory()
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from axolotl_skd.evaluation.answers.equivalence import equivalent

    equivalent("x^2+2x+1", "(x+1)^2")  # loads what a first pair would have to wait for
    signal.alarm(0)
    print(_READY, end="", file=answers, flush=True)
    while (worker := os.fork()) and os.waitpid(worker, 0)[1] != 0:
        print(_NO_VERDICT, end="", file=answers, flush=True)
    if worker:
        return
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        try:
            verdict = json.dumps(equivalent(*json.loads(line))) + "\n"
        except Exception:  # whatever sympy raises on nonsense, RecursionError among it
            verdict = _NO_VERDICT
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, end="", file=answers, flush=True)
    os._exit(0)


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


SHARED = GradingProcess()
atexit.register(SHARED.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SHARED.forget)
