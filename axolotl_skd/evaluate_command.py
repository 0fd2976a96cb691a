"""`axolotl skd eval CONFIG_OR_MODEL`: the bundled evaluation by hand, without training or teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from axolotl_skd.before_after import (
    eval_settings,
    evaluate,
    trained_model,
    untrained_model,
)
from axolotl_skd.config import read_distillation
from axolotl_skd.config_blocks import EvalConfig
from axolotl_skd.devices import present_devices
from axolotl_skd.evaluation.models import saved_model
from axolotl_skd.evaluation.needs import check_backend, check_needs
from axolotl_skd.evaluation.results import RESULTS_FILE, recorded_table, results_table
from axolotl_skd.evaluation.runner import run_tasks

_SUFFIXES = (".yml", ".yaml")
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_ADAPTER_WEIGHTS = ("adapter_model*.safetensors", "adapter_model*.bin")


class EvalCommandError(ValueError):
    """Arguments of `axolotl skd eval` that do not fit each other or what is there."""


def is_config(target: str) -> bool:
    """Whether the argument is a config (a `.yml`, `.yaml` or any file) rather than a model."""
    return target.endswith(_SUFFIXES) or Path(target).is_file()


def evaluate_config(
    path: Path,
    overrides: Mapping[str, Any],
    *,
    start: bool = False,
    output_dir: str | None = None,
    device: str | None = None,
    output: Path | None = None,
    log_samples: Path | None = None,
) -> str:
    """Evaluate what a config trained, record it, and show it beside the other stage.

    Args:
        path: of the YAML.
        overrides: keys of `distillation.eval` that replace the config's.
        start: evaluate the untrained base model instead.
        output_dir: replaces the config's, as on the command line of `axolotl train`.
        device: a torch device; None = the first accelerator, else the CPU.
        output: file of the results; None = `eval_results.json` in the output folder.
        log_samples: folder for lm-eval's samples.

    Returns:
        The table.

    Raises:
        EvalCommandError: the config is none, or nothing has been trained yet.
        ValueError, MissingForEvaluationError, EvaluationError: as the evaluation itself.
    """
    cfg = _read_config(path, output_dir)
    distillation = read_distillation(cfg)
    configured = distillation.eval if distillation is not None else None
    settings = _settings(configured.model_dump() if configured else {}, overrides, device)
    device = _device(device)
    if start:
        _save_tokenizer(path, cfg)
        model = untrained_model(cfg, device)
    else:
        _check_trained(cfg)
        model = trained_model(cfg, device)
    results = output or Path(cfg["output_dir"]) / RESULTS_FILE
    run = eval_settings(settings, log_samples)
    evaluate(model, run, settings.tasks, results, "start" if start else "end")
    return f"{recorded_table(results)}\n\nwritten to {results}"


def evaluate_model(
    name: str,
    overrides: Mapping[str, Any],
    *,
    device: str | None = None,
    output: Path | None = None,
    log_samples: Path | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Evaluate a model folder or hub id, an adapter on its base model.

    Args:
        name: of the model.
        overrides: keys as of `distillation.eval`; `tasks` is needed.
        device: a torch device; None = the first accelerator, else the CPU.
        output: receives `{task: {metric: value}}` as JSON.
        log_samples: folder for lm-eval's samples.
        trust_remote_code: run code that comes with the model.

    Returns:
        The table.

    Raises:
        EvalCommandError, ModelNotFoundError: the arguments.
        ValueError, MissingForEvaluationError, EvaluationError: as the evaluation itself.
    """
    settings = _settings({}, overrides, device)
    model = saved_model(name, _device(device), trust_remote_code)
    results = run_tasks(model, eval_settings(settings, log_samples), tasks=settings.tasks)
    table = results_table(results)
    if output is None:
        return table
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return f"{table}\n\nwritten to {output}"


def _read_config(path: Path, output_dir: str | None) -> dict[str, Any]:
    try:
        cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalCommandError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvalCommandError(f"{path} is no YAML: {error}") from error
    if not isinstance(cfg, dict) or not cfg.get("base_model"):
        raise EvalCommandError(f"{path} is no Axolotl config: it has no base_model.")
    if output_dir is not None:
        cfg["output_dir"] = output_dir
    if not cfg.get("output_dir"):
        raise EvalCommandError(f"{path} has no output_dir. Give --output-dir.")
    return cfg


def _settings(
    configured: Mapping[str, Any], overrides: Mapping[str, Any], device: str | None
) -> EvalConfig:
    values = {**configured, **overrides}
    if not values.get("tasks"):
        raise EvalCommandError("no tasks: give --tasks, or distillation.eval.tasks in a config.")
    settings = EvalConfig.model_validate(values)
    if settings.backend == "vllm" and device is not None:
        raise EvalCommandError(
            f"--device {device}: vLLM takes the first visible GPU. Set CUDA_VISIBLE_DEVICES instead."
        )
    check_needs(settings.tasks)
    check_backend(settings.backend)
    return settings


def _check_trained(cfg: Mapping[str, Any]) -> None:
    """By the weights: Axolotl writes the configurations when training begins."""
    folder = Path(cfg["output_dir"])
    names = _ADAPTER_WEIGHTS if cfg.get("adapter") else _MODEL_WEIGHTS
    if not any(path for name in names for path in folder.glob(name)):
        raise EvalCommandError(
            f"nothing has been trained yet: output_dir {folder} has no {' or '.join(names)}. --start "
            "evaluates the untrained base model; a checkpoint can be named itself: axolotl skd eval "
            f"{folder}/checkpoint-N --tasks ..."
        )


def _save_tokenizer(path: Path, cfg: Mapping[str, Any]) -> None:
    """Have the tokenizer in `output_dir` as training would set it up, chat template included."""
    if (Path(cfg["output_dir"]) / "tokenizer_config.json").is_file():
        return
    from axolotl.cli.config import prepare_plugins
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    whole = DictDefault(yaml.safe_load(path.read_text(encoding="utf-8")))
    whole.output_dir = cfg["output_dir"]
    prepare_plugins(whole)
    whole = validate_config(whole)
    normalize_config(whole)
    load_tokenizer(whole).save_pretrained(cfg["output_dir"])


def _device(name: str | None) -> str:
    """`name` if there is such a device (lm-eval would take another one), else the first there is."""
    present = present_devices()
    if name is not None and name not in present:
        raise EvalCommandError(f"--device {name} is not there. Take one of: {', '.join(present)}.")
    return name or present[0]
