"""The bundled evaluation before and after training: `distillation.eval`.

In a process of its own and on the first rank only; at the end the trainer is already gone.
`axolotl skd eval CONFIG` does the same by hand.
"""

from __future__ import annotations

import gc
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl_skd.config_blocks import EvalConfig
from axolotl_skd.evaluation.data_sources import local_folder
from axolotl_skd.evaluation.models import EvalModel, EvalSettings, honest_attention
from axolotl_skd.evaluation.needs import needs_data
from axolotl_skd.evaluation.results import (
    RESULTS_FILE,
    Stage,
    TaskMetrics,
    TaskSettings,
    forget,
    read_results,
    record,
    recorded_table,
    recorded_with,
)
from axolotl_skd.evaluation.runner import EvaluationError, run_tasks
from axolotl_skd.evaluation.tasks import leaf_tasks
from axolotl_skd.ranks import is_first_rank

LOG = get_logger(__name__)


def evaluate_start(
    cfg: Mapping[str, Any], settings: EvalConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Evaluate the untrained student; of a resumed run only what is not recorded already.

    Args:
        cfg: the Axolotl config.
        settings: `distillation.eval`.
        tokenizer: the student's, as Axolotl set it up (its chat template may come from the config).

    Raises:
        EvaluationError: before any training, with what to do.
    """
    if not is_first_rank():
        return
    results = Path(cfg["output_dir"]) / RESULTS_FILE
    # What is recorded of an earlier run into the same folder, or of this one's last end.
    forget(results, ["start"] if cfg.get("resume_from_checkpoint") else [])
    if "start" not in settings.at:
        return
    tokenizer.save_pretrained(cfg["output_dir"])
    model, run = untrained_model(cfg), eval_settings(settings)
    tasks = _not_recorded(results, "start", settings.tasks, model, run)
    if not tasks:
        LOG.info("the student was evaluated before training already: %s", results)
        return
    LOG.info("evaluating the student before training: %s", ", ".join(tasks))
    try:
        evaluate(model, run, tasks, results, "start")
    except EvaluationError as error:
        raise EvaluationError(
            f"{error}\nThis was the evaluation before training, and nothing has been trained. Mend "
            "it, or do without: distillation.eval.at: [end], or no distillation.eval."
        ) from error


def start_scores(cfg: Mapping[str, Any], settings: EvalConfig) -> TaskMetrics:
    """What `evaluate_start` recorded; empty if this run evaluates at the end only."""
    if "start" not in settings.at:
        return {}
    return read_results(Path(cfg["output_dir"]) / RESULTS_FILE).get("start", {})


def evaluate_end(cfg: Mapping[str, Any], settings: EvalConfig) -> TaskMetrics | None:
    """Evaluate what was saved and print it beside the start.

    Whatever fails is logged with how to do it again, never raised: the model is saved, and what
    other plugins do after training is not ours to prevent.

    Returns:
        The results; None if this rank or this run has none.
    """
    if not is_first_rank() or "end" not in settings.at:
        return None
    _free_memory()
    results = Path(cfg["output_dir"]) / RESULTS_FILE
    # The first rank, as seen; the process group that Axolotl's logger would ask is gone.
    say = partial(LOG.info, main_process_only=False)
    say("the trained student is saved in %s", cfg["output_dir"])
    say("evaluating the trained student: %s", ", ".join(settings.tasks))
    try:
        metrics = evaluate(
            trained_model(cfg), eval_settings(settings), settings.tasks, results, "end"
        )
        print(f"\n{recorded_table(results)}\n\nwritten to {results}", flush=True)
    except Exception as error:
        LOG.error(
            "The evaluation after training failed: %s\nThe trained student is safe in %s. To evaluate "
            "it again: %s",
            error,
            cfg["output_dir"],
            _again(cfg),
            main_process_only=False,
        )
        return None
    return metrics


def evaluate(
    model: EvalModel, settings: EvalSettings, tasks: Sequence[str], results: Path, stage: Stage
) -> TaskMetrics:
    """Run `tasks` and record them in `results`.

    Raises:
        EvaluationError, ValueError: as `run_tasks` and `record`.
    """
    read_results(results)  # refuses a broken file before the work, not after it
    metrics = run_tasks(model, settings, tasks=tasks)
    for task in dict.fromkeys([*tasks, *leaf_tasks(tasks), *metrics]):
        result = {task: metrics[task]} if task in metrics else {}
        record(results, stage, result, result_settings(model, settings, task), [task])
    return metrics


def untrained_model(cfg: Mapping[str, Any], device: str | None = None) -> EvalModel:
    """The student as it was before training, with the tokenizer in `output_dir`."""
    return _model(cfg, device, cfg["base_model"], cfg.get("lora_model_dir"))


def trained_model(cfg: Mapping[str, Any], device: str | None = None) -> EvalModel:
    """The student saved in `output_dir`: a full model, or an adapter on the base model."""
    if cfg.get("adapter"):
        return _model(cfg, device, cfg["base_model"], cfg["output_dir"])
    return _model(cfg, device, cfg["output_dir"])


def eval_settings(settings: EvalConfig, log_samples: Path | None = None) -> EvalSettings:
    """`distillation.eval` as the runner takes it."""
    return EvalSettings(
        limit=settings.limit,
        batch_size=settings.batch_size,
        apply_chat_template=settings.apply_chat_template,
        backend=settings.backend,
        log_samples=log_samples,
    )


def result_settings(model: EvalModel, settings: EvalSettings, task: str) -> TaskSettings:
    """What a task's result depends on, recorded beside it."""
    data = local_folder() if needs_data(task) else None
    template = _template_digest(model) if settings.apply_chat_template else None
    return {
        "model": model.base_model,
        "revision": model.revision,
        "adapter": model.adapter,
        "backend": settings.backend,
        "limit": settings.limit,
        "batch_size": None if settings.backend == "vllm" else settings.batch_size,
        "apply_chat_template": settings.apply_chat_template,
        "chat_template_sha256": template,
        "data": None if data is None else str(data.resolve()),
    }


def _not_recorded(
    results: Path, stage: Stage, tasks: Sequence[str], model: EvalModel, settings: EvalSettings
) -> list[str]:
    """Those of `tasks` that are not recorded, themselves and all their members, with these settings."""

    def is_recorded(task: str) -> bool:
        return task in recorded_with(results, stage, result_settings(model, settings, task))

    return [task for task in tasks if not all(map(is_recorded, {task, *leaf_tasks([task])}))]


def _template_digest(model: EvalModel) -> str:
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer or model.base_model, trust_remote_code=model.trust_remote_code
    )
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _free_memory() -> None:
    """Give back what the deleted trainer reserved, so that the child finds room on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _again(cfg: Mapping[str, Any]) -> str:
    """The command that repeats the evaluation of this run, whatever its command line overrode."""
    config = str(cfg.get("axolotl_config_path") or "CONFIG")
    return shlex.join(["axolotl", "skd", "eval", config, "--output-dir", str(cfg["output_dir"])])


def _model(
    cfg: Mapping[str, Any], device: str | None, base_model: str, adapter: str | None = None
) -> EvalModel:
    is_the_base = base_model == cfg["base_model"]
    return EvalModel(
        base_model=base_model,
        revision=cfg.get("revision_of_model") if is_the_base else None,
        adapter=adapter,
        tokenizer=cfg["output_dir"],
        device=device or str(cfg.get("device") or "cpu"),
        trust_remote_code=bool(cfg.get("trust_remote_code")),
        attn_implementation=honest_attention(base_model),
    )
