"""What bundled tasks need before they can run: data, packages, and for COMET a checkpoint.

Asked before training, so that hours of it do not end in an evaluation that cannot be made.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from axolotl_skd.evaluation.benchmarks import BENCHMARKS
from axolotl_skd.evaluation.comet import CometCheckpointError, CometUnavailableError, comet_scores
from axolotl_skd.evaluation.data_sources import (
    DataSource,
    DataUnavailableError,
    local_folder,
)
from axolotl_skd.evaluation.models import Backend
from axolotl_skd.evaluation.tasks import leaf_tasks

_PREFIX = "skd_"
_COMET_TASK = "skd_flores_asm_eng"
# Import name -> the tasks that score with it; those of no row are graded by math-verify.
_SCORERS = {"rouge_score": ("skd_dialogsum",), "sacrebleu": (_COMET_TASK,)}


class MissingForEvaluationError(RuntimeError):
    """Data or packages that an evaluation needs; one line each, with what to do."""


def check_needs(names: Iterable[str]) -> None:
    """Refuse tasks that could not run: a package or a local file is missing.

    Whether the hub has a data set is not asked: that is a download.

    Args:
        names: of bundled tasks and groups.

    Raises:
        ValueError: for a task that is not bundled.
        MissingForEvaluationError: everything that is missing.
    """
    tasks = leaf_tasks(names)
    problems = [*_missing_packages(tasks), *_missing_files(tasks)]
    if problems:
        raise MissingForEvaluationError("\n".join(problems))


def check_backend(backend: Backend) -> None:
    """Refuse vLLM where it cannot run.

    Raises:
        MissingForEvaluationError
    """
    if backend != "vllm":
        return
    # The wrapper of lm-eval 0.4.11 imports both at its top.
    missing = [name for name in ("vllm", "ray") if find_spec(name) is None]
    if missing:
        raise MissingForEvaluationError(
            f"the backend vllm needs what is not installed here: pip install {' '.join(missing)} (in "
            "an environment that keeps Axolotl's torch), or use the backend hf."
        )
    import torch

    if not torch.cuda.is_available():
        raise MissingForEvaluationError(
            "the backend vllm needs a GPU, and torch sees none here. Use the backend hf."
        )


def fetch_from_hub(names: Iterable[str]) -> list[str]:
    """Have the hub's data sets in the local cache, unless `SKD_DATA_DIR` replaces them.

    Returns:
        Their repositories.

    Raises:
        DataUnavailableError: naming both ways to get the data.
    """
    if local_folder() is not None:
        return []
    sources = [source for task in leaf_tasks(names) for source in _sources(task)]
    for source in sources:
        source.load()
    return list(dict.fromkeys(source.repo for source in sources))


def why_no_comet(names: Iterable[str]) -> str | None:
    """Why COMET could not be computed for the task that wants it; None if it could or none does."""
    if _COMET_TASK not in leaf_tasks(names):
        return None
    try:
        comet_scores([], [], [])
    except (CometUnavailableError, CometCheckpointError) as error:
        return str(error)
    return None


def _sources(task: str) -> tuple[DataSource, ...]:
    """By the convention that `skd_<benchmark>` reads that benchmark; a task of its own has none."""
    benchmark = BENCHMARKS.get(task.removeprefix(_PREFIX))
    return benchmark.sources if benchmark else ()


def _missing_files(tasks: Iterable[str]) -> Iterable[str]:
    folder = local_folder()
    if folder is None:
        return
    for task in tasks:
        for source in _sources(task):
            try:
                source.check_local(folder)
            except DataUnavailableError as error:
                yield f"{task}: {error}"


def _missing_packages(tasks: Iterable[str]) -> Iterable[str]:
    wanted: dict[str, str] = {"lm_eval": "every task"}
    for task in tasks:
        if _sources(task):
            scorer = next((name for name, users in _SCORERS.items() if task in users), None)
            wanted.setdefault(scorer or "math_verify", task)
    for name, user in wanted.items():
        if find_spec(name) is None:
            yield f"{user}: needs the package {name}: pip install 'axolotl-skd[eval]'"
