"""The bundled evaluation before and after training: `distillation.eval`.

In a process of its own and on the first rank only; at the end the trainer is already gone.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import PreTrainedTokenizerBase

from axolotl_skd.config import EvalConfig
from axolotl_skd.evaluation.results import comparison_table, read_results, record
from axolotl_skd.evaluation.runner import EvalModel, run_tasks
from axolotl_skd.ranks import is_first_rank

LOG = get_logger(__name__)

RESULTS_FILE = "eval_results.json"


def evaluate_start(
    cfg: Mapping[str, Any], settings: EvalConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Evaluate the untrained student, unless this run goes on from a checkpoint and has done so.

    Args:
        cfg: the Axolotl config.
        settings: `distillation.eval`.
        tokenizer: the student's, as Axolotl set it up (its chat template may come from the config).
    """
    results = Path(cfg["output_dir"]) / RESULTS_FILE
    done = cfg.get("resume_from_checkpoint") and "start" in read_results(results)
    if not is_first_rank() or done:
        return
    results.unlink(missing_ok=True)  # of an earlier run into the same folder
    if "start" not in settings.at:
        return
    tokenizer.save_pretrained(cfg["output_dir"])
    LOG.info("evaluating the student before training: %s", ", ".join(settings.tasks))
    model = _eval_model(cfg, base_model=cfg["base_model"], adapter=cfg.get("lora_model_dir"))
    record(results, "start", _run(model, settings))


def evaluate_end(cfg: Mapping[str, Any], settings: EvalConfig) -> None:
    """Evaluate what was saved and print it beside the start."""
    if not is_first_rank() or "end" not in settings.at:
        return
    _free_memory()
    results = Path(cfg["output_dir"]) / RESULTS_FILE
    # The first rank, as seen; the process group that Axolotl's logger would ask is gone.
    say = partial(LOG.info, main_process_only=False)
    say("the trained student is saved in %s", cfg["output_dir"])
    say("evaluating the trained student: %s", ", ".join(settings.tasks))
    if cfg.get("adapter"):
        model = _eval_model(cfg, base_model=cfg["base_model"], adapter=cfg["output_dir"])
    else:
        model = _eval_model(cfg, base_model=cfg["output_dir"])
    record(results, "end", _run(model, settings))
    print(f"\n{comparison_table(read_results(results))}\n\nwritten to {results}", flush=True)


def _free_memory() -> None:
    """Give back what the deleted trainer reserved, so that the child finds room on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _eval_model(cfg: Mapping[str, Any], base_model: str, adapter: str | None = None) -> EvalModel:
    return EvalModel(
        base_model=base_model,
        adapter=adapter,
        tokenizer=cfg["output_dir"],
        device=cfg.get("device") or "cpu",
        trust_remote_code=bool(cfg.get("trust_remote_code")),
    )


def _run(model: EvalModel, settings: EvalConfig) -> dict[str, dict[str, float]]:
    return run_tasks(
        model, tasks=settings.tasks, limit=settings.limit, batch_size=settings.batch_size
    )
