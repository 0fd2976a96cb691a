"""Running the bundled lm-eval tasks on a saved model, in a process of their own.

A child process, because lm-eval loads the model anew, brings its own seeds and logging, and must
not see the distributed job that it is started from.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_skd.evaluation.models import EvalModel, EvalSettings, adapter_config, vllm_lora_rank
from axolotl_skd.evaluation.tasks import check_tasks
from axolotl_skd.resources import resource_path

LOG = logging.getLogger(__name__)

_TAIL_LINES = 20
# Share of the GPU that vLLM reserves; the training process that waits keeps a CUDA context there.
_VLLM_MEMORY = 0.8

# Set by torchrun, accelerate, deepspeed and MPI for each of their workers.
_LAUNCHER_VARIABLES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "LOCAL_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "FORK_LAUNCHED",
    }
)
_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
    "OMPI_COMM_WORLD_",
    "PMI_",
    "PMIX_",
    "MV2_COMM_WORLD_",
)


class EvaluationError(RuntimeError):
    """An evaluation that did not finish: lm-eval's last lines and the command to run it again."""


def lm_eval_command(
    model: EvalModel, settings: EvalSettings, *, tasks: Sequence[str], output_dir: Path
) -> list[str]:
    """The command line that evaluates `model` on bundled `tasks`.

    Args:
        model: what to load.
        settings: how to run it.
        tasks: names of bundled tasks.
        output_dir: folder that receives `results_<time>.json`; made if it is not there.
    """
    command = [sys.executable, "-m", "lm_eval", "run"]
    # As JSON, because in the key=value form a comma or brace in a path ends the value, and a model
    # named by a number becomes one.
    command += [
        "--model",
        settings.backend,
        "--model_args",
        json.dumps(_model_args(model, settings)),
    ]
    command += ["--include_path", str(resource_path("evals")), "--tasks", ",".join(tasks)]
    if settings.backend == "vllm":
        # It fills the batch by itself, and takes the first visible GPU.
        command += ["--batch_size", "auto"]
    else:
        command += ["--device", model.device, "--batch_size", str(settings.batch_size)]
    # Named as a file: in a bare folder lm-eval makes a subfolder from the model's whole path, and
    # when that name is too long for the file system it only warns and saves nothing.
    command += ["--output_path", str(output_dir / "results.json")]
    if settings.limit is not None:
        command += ["--limit", str(settings.limit)]
    if settings.apply_chat_template:
        command.append("--apply_chat_template")
    if settings.log_samples is not None:
        command.append("--log_samples")
    return command


def _model_args(model: EvalModel, settings: EvalSettings) -> dict[str, Any]:
    args: dict[str, Any] = {
        "pretrained": model.base_model,
        "revision": model.revision,
        "tokenizer": model.tokenizer,
        "dtype": "auto",  # as saved
        "trust_remote_code": model.trust_remote_code or None,
    }
    if settings.backend == "vllm":
        args["gpu_memory_utilization"] = _VLLM_MEMORY
        if model.adapter is not None:
            args["lora_local_path"] = model.adapter
            args["max_lora_rank"] = vllm_lora_rank(adapter_config(model.adapter))
    else:
        args["peft"] = model.adapter
        args["attn_implementation"] = model.attn_implementation
    return {key: value for key, value in args.items() if value is not None}


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without a distributed launcher's variables, or a child would wait for peers."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def run_tasks(
    model: EvalModel, settings: EvalSettings, *, tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Evaluate `model` on bundled `tasks` and wait for the result.

    The child needs memory for a model of its own on `model.device`. In a distributed job call this
    on one rank only. Arguments are those of `lm_eval_command`.

    Returns:
        `{task: {metric: value}}`, e.g. `{"skd_tiny_arithmetic": {"acc": 0.4, "acc_stderr": 0.02}}`.

    Raises:
        ValueError: for a task that is not bundled.
        EvaluationError: if lm-eval fails or leaves no results.
    """
    check_tasks(tasks)
    with tempfile.TemporaryDirectory(prefix="axolotl_skd_eval_") as folder:
        command = lm_eval_command(model, settings, tasks=tasks, output_dir=Path(folder))
        LOG.info("evaluating on %s: %s", ", ".join(tasks), shlex.join(command))
        child = subprocess.run(
            command,
            env=child_environment(os.environ) | {"PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        written = sorted(Path(folder).glob("results_*.json"))
        # lm-eval exits with 0 when it could not save its results.
        if child.returncode != 0 or not written:
            raise EvaluationError(_failure(child, command))
        results = json.loads(written[-1].read_text(encoding="utf-8"))["results"]
        if settings.log_samples is not None:
            settings.log_samples.mkdir(parents=True, exist_ok=True)
            for samples in Path(folder).glob("samples_*.jsonl"):
                shutil.move(samples, settings.log_samples / samples.name)
    for name in _unmeasured(results):
        LOG.warning("%s could not be computed; to see why: %s", name, shlex.join(command))
    return _plain_metrics(results)


def _cause(returncode: int) -> str:
    if returncode < 0:
        return f"killed by signal {-returncode}; 9 often means out of memory"
    return f"exit code {returncode}" if returncode else "no results were written"


def _failure(child: subprocess.CompletedProcess[str], command: Iterable[str]) -> str:
    tail = "\n".join(f"    {line}" for line in child.stdout.splitlines()[-_TAIL_LINES:])
    return (
        f"lm-eval failed ({_cause(child.returncode)}). Its last lines:\n{tail}\n"
        f"To run it again:\n{shlex.join(command)}"
    )


def _unmeasured(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics that are NaN, e.g. COMET without a checkpoint.

    Not those of a breakdown (`acc_algebra`): under a limit there may be no rows of a kind.
    """
    return [
        f"{task}: {key.partition(',')[0]}"
        for task, entries in results.items()
        for key, value in entries.items()
        if isinstance(value, float) and math.isnan(value) and not key.startswith("acc_")
    ]


def _plain_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """lm-eval's `{"acc,none": 0.4, "acc_stderr,none": "N/A", "alias": ...}` as plain numbers.

    The part after the comma is the filter's name; bundled tasks use one filter. A NaN is a metric
    that was not measured (no rows of that kind under a limit, no COMET) and is left out, as is a
    group without a number of its own.
    """
    plain = {
        task: {
            key.partition(",")[0]: float(value)
            for key, value in entries.items()
            if "," in key and isinstance(value, int | float) and not math.isnan(value)
        }
        for task, entries in results.items()
    }
    return {task: metrics for task, metrics in plain.items() if metrics}
