"""Several ranks: which combinations are refused, and which were never tried, before anything is loaded.

The README's table of engines says the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_skd.config import Distillation
from axolotl_skd.preflight import ConfigConflictError
from axolotl_skd.sharding import Engine

LOG = get_logger(__name__)


# What has been seen of an engine so far, said at start; none: tested.
_UNTRIED = {
    Engine.ZERO_1_2: "the losses and gradients are scaled as under DDP, but it has not been run by us",
    Engine.ZERO_3: "it has been run on CPU ranks only, not on GPUs",
    Engine.FSDP_2: "its gathering has been tested on CPU ranks, but not a run through Axolotl on GPUs",
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
    if distillation.teacher.device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigConflictError(
            f"distillation.teacher.device_map: {distillation.teacher.device_map} would let every rank "
            "spread its teacher over the devices of all. Launch one process, or use device:."
        )
    if engine.shards_weights:
        _refuse_unsharded(cfg, distillation, engine)
    return engine


def warn_of_untested(engine: Engine) -> None:
    if engine in _UNTRIED:
        LOG.warning(
            "%s is untested: %s. Compare the first losses with a run on one rank.",
            engine.value,
            _UNTRIED[engine],
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


def _refuse_unsharded(
    cfg: Mapping[str, Any], distillation: Distillation, engine: Engine
) -> None:
    """Weights that the engine cannot spread, or that something else would move."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if cfg.get(key):
            raise ConfigConflictError(
                f"{key}: {cfg[key]}: {engine.value} cannot gather quantised weights of the student for "
                f"rollouts. {_WHOLE_INSTEAD}."
            )
    teacher = distillation.teacher if distillation.method_row.needs_teacher else None
    if teacher is not None:
        _refuse_teacher(teacher, engine)
    if distillation.rollout.cuda_graphs:
        raise ConfigConflictError(
            f"distillation.rollout.cuda_graphs: true records where weights lie, and {engine.value} "
            "gathers them elsewhere each time. Set cuda_graphs: false."
        )
    if engine is Engine.ZERO_3:
        if teacher is not None and "optimizer" in _deepspeed_config(cfg):
            raise ConfigConflictError(
                "deepspeed: has an optimizer section, which DeepSpeed would apply to the frozen teacher "
                "as well. Remove it; Axolotl's optimizer: is used."
            )
        return
    fsdp = cfg.get("fsdp_config") or {}
    for key in ("cpu_ram_efficient_loading", "offload_params"):
        if fsdp.get(key):
            raise ConfigConflictError(
                f"fsdp_config.{key}: true leaves ranks without the weights that the start-up check and "
                f"rollouts need. Set {key}: false."
            )


def _refuse_teacher(teacher: Any, engine: Engine) -> None:
    refused = {
        teacher.quantised or "": "a quantised teacher",
        "student_base" if teacher.student_base else "": "the student's own base as the teacher",
        "adapter" if teacher.adapter else "": "a teacher with an adapter",
        "offload" if teacher.offload else "": "an offloaded teacher",
        "device" if teacher.device else "": "a teacher on a device of its own",
        "device_map" if teacher.device_map else "": "a teacher on devices of its own",
    }
    for key, what in refused.items():
        if key:
            raise ConfigConflictError(
                f"distillation.teacher.{key}: {engine.value} spreads the teacher over the ranks, and "
                f"{what} is not supported there. {_WHOLE_INSTEAD}; or name an unquantised, merged "
                f"checkpoint by base_model and remove {key}."
            )
