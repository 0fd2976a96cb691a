"""Several ranks: which combinations are refused, and which were never tried, before anything is loaded.

The README's table of engines says the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_skd.config import Distillation
from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.cpu import on_cpu
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.ranks import num_launched
from axolotl_skd.sharding import Engine
from axolotl_skd.teacher import is_quantised

LOG = get_logger(__name__)


# What has been seen of an engine so far, said at start; none: tested.
_UNTRIED = {
    Engine.ZERO_1_2: "weights are whole as under DDP, but deepspeed 0.18.9 itself fails on CPU ranks, "
    "and it has not been run on GPUs",
    Engine.ZERO_3: "it has been run on CPU ranks only, not on GPUs",
    Engine.FSDP_2: "its gathering has been run on CPU ranks; through Axolotl, which needs GPUs, "
    "nothing has",
}

_WHOLE_INSTEAD = (
    "Remove deepspeed: / fsdp_config: (DDP, one teacher on every rank), or use ZeRO-1 or ZeRO-2, which "
    "leave weights whole"
)


def check_ranks(cfg: Mapping[str, Any], distillation: Distillation) -> Engine:
    """Refuse what cannot work on several ranks.

    Args:
        cfg: the Axolotl config; `deepspeed` as a mapping or the path of its JSON file.
        distillation: its typed block.

    Returns:
        the engine asked for.

    Raises:
        ConfigConflictError
    """
    engine = engine_of(cfg)
    if distillation.teacher.device_map and num_launched() > 1:
        raise ConfigConflictError(
            f"distillation.teacher.device_map: {distillation.teacher.device_map} would let every rank "
            "spread its teacher over the devices of all. Launch one process, or use device:."
        )
    if engine in (Engine.ZERO_1_2, Engine.ZERO_3) and distillation.fp32_master_weights:
        raise ConfigConflictError(
            f"distillation.fp32_master_weights: true: {engine.value} holds float32 masters of its own. "
            "Remove it."
        )
    if distillation.teacher.gather == "layers":
        _refuse_whole(distillation, engine)
    if engine.shards_weights:
        _refuse_unsharded(cfg, distillation, engine)
    return engine


def check_engine_is_there(raw: Mapping[str, Any]) -> None:
    """Refuse an engine that is not installed, ahead of Axolotl, which would fail without a word.

    Args:
        raw: the config as written.

    Raises:
        ConfigConflictError
    """
    if raw.get("deepspeed") and find_spec("deepspeed") is None:
        raise ConfigConflictError(
            "deepspeed: is set, but the package is not installed. pip install deepspeed (Axolotl's "
            "extra axolotl[deepspeed]), or remove deepspeed:."
        )


def check_engine_can_start(engine: Engine) -> None:
    """Refuse one that this machine cannot run, though it can prepare its data.

    Raises:
        ConfigConflictError
    """
    if engine is Engine.FSDP_2 and on_cpu():
        raise ConfigConflictError(
            "fsdp_config: is set, but there is no GPU, and accelerate starts FSDP on no other device. "
            "Remove it (DDP), or run it where there are GPUs."
        )


def warn_of_untested(cfg: Mapping[str, Any], engine: Engine) -> None:
    """Say what nobody has tried yet."""
    untried = {engine.value: _UNTRIED[engine]} if engine in _UNTRIED else {}
    if engine is Engine.WHOLE and num_launched() > 1 and not on_cpu():
        untried["DDP"] = "it has been run on CPU ranks only, not on GPUs"
    if cfg.get("use_ray"):
        untried["use_ray: true"] = (
            "the config passes Ray's second validation, but Ray has not been run"
        )
    for what, why in untried.items():
        LOG.warning(
            "%s is untested: %s. Compare the first losses with a run on one rank.", what, why
        )


def engine_of(cfg: Mapping[str, Any]) -> Engine:
    """The engine that a config asks for.

    Raises:
        ConfigConflictError: FSDP1, or a DeepSpeed config of no known stage.
    """
    if cfg.get("fsdp") or cfg.get("fsdp_config"):
        inner = cfg.get("fsdp_config") or {}
        version = cfg.get("fsdp_version") or inner.get("fsdp_version")
        if str(version) != "2":
            raise ConfigConflictError(
                f"fsdp_version: {version}: FSDP1 flattens weights, from which neither rollouts nor the "
                "loss can take what they need. Set fsdp_version: 2 with fsdp_config:."
            )
        return Engine.FSDP_2
    if not cfg.get("deepspeed"):
        return Engine.WHOLE
    stage = (_deepspeed_config(cfg).get("zero_optimization") or {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigConflictError(
            f"deepspeed: zero_optimization.stage is {stage!r}, needed is a number from 0 to 3."
        )
    return Engine.ZERO_3 if stage == 3 else Engine.ZERO_1_2


def _deepspeed_config(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    given = cfg["deepspeed"]
    if isinstance(given, Mapping):
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigConflictError(
            f"deepspeed: {given!r} could not be read as JSON ({type(error).__name__}: {error}). Give a "
            "file, e.g. of `axolotl fetch deepspeed_configs`."
        ) from None


def _refuse_unsharded(cfg: Mapping[str, Any], distillation: Distillation, engine: Engine) -> None:
    """Weights that the engine cannot spread, or that something else would move."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if cfg.get(key):
            raise ConfigConflictError(
                f"{key}: {cfg[key]}: {engine.value} cannot gather quantised weights of the student for "
                f"rollouts. {_WHOLE_INSTEAD}."
            )
    if distillation.method_row.needs_teacher:
        _refuse_teacher(distillation.teacher, engine)
        if engine is Engine.ZERO_3:
            _refuse_other_dtype(cfg, distillation.teacher)
    if distillation.on_non_finite == "skip":
        raise ConfigConflictError(
            f"distillation.on_non_finite: skip looks at the teacher's numbers before the loss, where "
            f"{engine.value} has its head in parts. Set on_non_finite: stop."
        )
    if distillation.rollout.cuda_graphs:
        raise ConfigConflictError(
            f"distillation.rollout.cuda_graphs: true records where weights lie, and {engine.value} "
            "gathers them elsewhere each time. Set cuda_graphs: false."
        )
    evaluated = distillation.eval is not None and "end" in distillation.eval.at
    if engine is Engine.ZERO_3:
        _refuse_zero3(_deepspeed_config(cfg), evaluated)
    else:
        _refuse_fsdp(cfg.get("fsdp_config") or {}, evaluated)


def _refuse_zero3(config: Mapping[str, Any], evaluated: bool) -> None:
    if "optimizer" in config:
        raise ConfigConflictError(
            "deepspeed: has an optimizer section, which DeepSpeed would apply to the frozen teacher as "
            "well. Remove it; Axolotl's optimizer: is used."
        )
    if evaluated and not config["zero_optimization"].get(
        "stage3_gather_16bit_weights_on_model_save"
    ):
        raise ConfigConflictError(
            "distillation.eval needs the trained model in one piece. Set zero_optimization."
            "stage3_gather_16bit_weights_on_model_save: true in deepspeed:, or eval.at: [start]."
        )


def _refuse_fsdp(config: Mapping[str, Any], evaluated: bool) -> None:
    for key in ("cpu_ram_efficient_loading", "offload_params"):
        if config.get(key):
            raise ConfigConflictError(
                f"fsdp_config.{key}: true leaves ranks without the weights that the start-up check and "
                f"rollouts need. Set {key}: false."
            )
    saved = config.get("final_state_dict_type") or config.get("state_dict_type")
    if evaluated and saved != "FULL_STATE_DICT":
        raise ConfigConflictError(
            f"distillation.eval needs the trained model in one piece, but it is saved as {saved}. Set "
            "fsdp_config.final_state_dict_type: FULL_STATE_DICT, or eval.at: [start]."
        )


def _refuse_whole(distillation: Distillation, engine: Engine) -> None:
    """A teacher of which nothing is elsewhere has nothing to gather."""
    why = None
    if not distillation.method_row.needs_teacher:
        why = f"method {distillation.method} has no teacher"
    elif not engine.shards_weights:
        why = f"with {engine.value} the teacher is whole on every rank"
    elif is_quantised(distillation.teacher):
        why = "a quantised teacher is whole on every rank"
    if why is not None:
        raise ConfigConflictError(
            f"distillation.teacher.gather: layers, but {why}. Remove gather:; or spread an "
            "unquantised teacher by DeepSpeed ZeRO-3 or FSDP2 (deepspeed: / fsdp_config:)."
        )


def _refuse_teacher(teacher: TeacherConfig, engine: Engine) -> None:
    """For what an unquantised one is; others stay whole on every rank, and may be anything."""
    refused = {
        "student_base": "the student's own base as the teacher",
        "adapter": "a teacher with an adapter",
        "offload": "an offloaded teacher",
        "device": "a teacher on a device of its own",
        "device_map": "a teacher on devices of its own",
    }
    for key, what in refused.items():
        if getattr(teacher, key) and _is_spread(teacher):
            raise ConfigConflictError(
                f"distillation.teacher.{key}: {engine.value} spreads an unquantised teacher over the "
                f"ranks, and {what} is not supported there. Remove {key} and name a merged checkpoint "
                "by base_model; or set load_in_4bit: true, which leaves the teacher whole on every "
                f"rank. {_WHOLE_INSTEAD}."
            )


def _is_spread(teacher: TeacherConfig) -> bool:
    return teacher.student_base or not is_quantised(teacher)


def _refuse_other_dtype(cfg: Mapping[str, Any], teacher: TeacherConfig) -> None:
    """DeepSpeed gives the weights of every model that it spreads the precision of the run."""
    precision = "bfloat16" if cfg.get("bf16") else "float16" if cfg.get("fp16") else "float32"
    if teacher.dtype not in ("auto", precision) and _is_spread(teacher):
        raise ConfigConflictError(
            f"distillation.teacher.dtype: {teacher.dtype}, but under {Engine.ZERO_3.value} the teacher "
            f"gets the run's precision, {precision}. Remove dtype:, or set bf16: / fp16: to match."
        )
