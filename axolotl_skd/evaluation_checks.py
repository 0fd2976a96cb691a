"""What can be known to be wrong with `distillation.eval` before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import PreTrainedTokenizerBase

from axolotl_skd.config_blocks import EvalConfig
from axolotl_skd.evaluation.data_sources import DataUnavailableError
from axolotl_skd.evaluation.models import vllm_lora_rank
from axolotl_skd.evaluation.needs import (
    MissingForEvaluationError,
    check_backend,
    check_needs,
    fetch_from_hub,
    why_no_comet,
)
from axolotl_skd.evaluation.tasks import check_tasks
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.ranks import is_first_rank

LOG = get_logger(__name__)

# Axolotl's keys for adapters that vLLM does not load.
_NOT_IN_VLLM = ("peft_use_dora", "lora_modules_to_save")


def check_evaluation(cfg: Mapping[str, Any], settings: EvalConfig) -> None:
    """Refuse an evaluation whose tasks, packages, local data or backend are not there.

    Args:
        cfg: the Axolotl config.
        settings: `distillation.eval`.

    Raises:
        ConfigConflictError: names the key.
    """
    try:
        check_tasks(settings.tasks)
    except ValueError as error:
        raise ConfigConflictError(
            f"distillation.eval.tasks: {error} Only the bundled tasks can be run from the config."
        ) from None
    try:
        check_needs(settings.tasks)
    except MissingForEvaluationError as error:
        raise ConfigConflictError(f"distillation.eval.tasks: {error}") from None
    try:
        check_backend(settings.backend)
    except MissingForEvaluationError as error:
        raise ConfigConflictError(f"distillation.eval.backend: {error}") from None
    if settings.backend == "vllm":
        _check_adapter_for_vllm(cfg)


def check_evaluation_inputs(settings: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an evaluation without a chat template or without its data on the hub; say what is missing.

    The hub's data are fetched now, since the evaluation after training needs them in any case.

    Args:
        settings: `distillation.eval`.
        tokenizer: the student's, as Axolotl set it up.

    Raises:
        ConfigConflictError: names the key.
    """
    if settings.apply_chat_template and not tokenizer.chat_template:
        raise ConfigConflictError(
            "distillation.eval.apply_chat_template: true, but the student's tokenizer has no chat "
            "template. Set chat_template:, or distillation.eval.apply_chat_template: false."
        )
    if not is_first_rank():
        return
    reason = why_no_comet(settings.tasks)
    if reason:
        LOG.warning("distillation.eval: COMET will be missing (chrF is computed): %s", reason)
    try:
        repositories = fetch_from_hub(settings.tasks)
    except DataUnavailableError as error:
        raise ConfigConflictError(f"distillation.eval.tasks: {error}") from error
    if repositories:
        LOG.info(
            "distillation.eval: SKD_DATA_DIR is not set, so the data come from the hub: %s",
            ", ".join(repositories),
        )


def _check_adapter_for_vllm(cfg: Mapping[str, Any]) -> None:
    if not cfg.get("adapter"):
        return
    for key in _NOT_IN_VLLM:
        if cfg.get(key):
            raise ConfigConflictError(
                f"distillation.eval.backend: vllm does not load adapters with {key}: {cfg[key]}. "
                "Set backend: hf."
            )
    try:
        vllm_lora_rank({"r": cfg.get("lora_r")})
    except ValueError as error:
        raise ConfigConflictError(f"distillation.eval.backend: {error}") from None
