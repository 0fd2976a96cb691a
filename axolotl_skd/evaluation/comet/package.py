"""Scoring with the package unbabel-comet in a Python of its own, as a child process.

unbabel-comet (2.2.7) needs transformers below 5, which Axolotl's environment cannot have.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from axolotl_skd.evaluation.comet.errors import CometUnavailableError
from axolotl_skd.evaluation.comet.files import CheckpointFiles
from axolotl_skd.evaluation.runner import child_environment

_TAIL_LINES = 20
_CHILD = Path(__file__).with_name("child.py")


def score_with_package(
    files: CheckpointFiles,
    python: str,
    sources: Sequence[str],
    translations: Sequence[str],
    references: Sequence[str],
    batch_size: int,
    device: str,
) -> list[float]:
    """The scores that unbabel-comet gives, in the order given.

    The encoder's configuration and tokenizer are fetched by unbabel-comet, from the hub if they are
    not in the cache. The child does not see PYTHONPATH and PYTHONHOME, which are about this Python.

    Args:
        files: of the checkpoint.
        python: an interpreter that has unbabel-comet.
        sources: N texts.
        translations: N texts.
        references: N texts.
        batch_size: translations at a time.
        device: as for `comet_scores`.

    Raises:
        CometUnavailableError: the interpreter cannot be run, has no unbabel-comet, or fails; with
            its last lines.
    """
    samples = [
        {"src": source, "mt": translation, "ref": reference}
        for source, translation, reference in zip(sources, translations, references, strict=True)
    ]
    request = {
        "checkpoint": str(files.weights.absolute()),
        "samples": samples,
        "batch_size": batch_size,
        "device": device,
    }
    with tempfile.TemporaryDirectory(prefix="axolotl_skd_comet_") as folder:
        request_file, scores_file = Path(folder, "request.json"), Path(folder, "scores.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # A copy, because Python puts a script's own folder first on the import path.
        script = shutil.copy(_CHILD, folder)
        command = [python, script, str(request_file), str(scores_file)]
        environment = child_environment(os.environ)
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
        try:
            child = subprocess.run(
                command,
                env=environment | {"PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise CometUnavailableError(
                f"the Python for unbabel-comet cannot be run: {error}. SKD_COMET_PYTHON or the "
                "option python takes the path of an interpreter, e.g. comet-env/bin/python"
            ) from error
        if child.returncode != 0 or not scores_file.exists():
            raise CometUnavailableError(_failure(child, python))
        return json.loads(scores_file.read_text(encoding="utf-8"))


def _failure(child: subprocess.CompletedProcess[str], python: str) -> str:
    tail = "\n".join(f"    {line}" for line in child.stdout.splitlines()[-_TAIL_LINES:])
    return (
        f"unbabel-comet did not score (exit code {child.returncode}). Its last lines:\n{tail}\n"
        "It needs an environment of its own, for instance with\n"
        f"    {shlex.quote(python)} -m pip install 'unbabel-comet>=2.2.7' 'setuptools<81'"
    )
