"""The student before and after training, as the config says where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from axolotl_skd.draft_report.errors import DraftReportError
from axolotl_skd.draft_report.widths import grow_to
from axolotl_skd.rollout.attention import default_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFiles:
    """Where a student is.

    Attributes:
        base_model: folder or hub id of the full model.
        adapter: folder of a LoRA adapter on it.
        keys: of the config that say so, for messages.
        revision: of the base model on the hub.
        trust_remote_code: run code that comes with it.
    """

    base_model: str
    adapter: str | None
    keys: str
    revision: str | None = None
    trust_remote_code: bool = False


def student_files(cfg: Mapping[str, Any]) -> dict[str, StudentFiles]:
    """The student "before", and "after" if training has saved one in `output_dir`."""
    trust = bool(cfg.get("trust_remote_code"))
    start = {
        "base_model": cfg["base_model"],
        "revision": cfg.get("revision_of_model"),
        "trust_remote_code": trust,
    }
    students = {
        "before": StudentFiles(**start, adapter=cfg.get("lora_model_dir"), keys="base_model")
    }
    output_dir = cfg["output_dir"]
    if cfg.get("adapter"):
        if _holds(output_dir, "adapter_model*"):
            students["after"] = StudentFiles(
                **start, adapter=output_dir, keys="base_model with the adapter in output_dir"
            )
    elif _holds(output_dir, "model*.safetensors", "pytorch_model*.bin"):
        students["after"] = StudentFiles(
            base_model=output_dir, adapter=None, keys="output_dir", trust_remote_code=trust
        )
    return students


def _holds(folder: str, *patterns: str) -> bool:
    """Weights, that is; Axolotl writes the configuration before it trains."""
    return any(any(Path(folder).glob(pattern)) for pattern in patterns)


def load_student(
    files: StudentFiles, *, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load a student unquantised and in evaluation mode, an adapter merged into it.

    Args:
        files: where it is.
        num_tokens: of the tokenizer; embeddings grow to it, as in training.
        dtype, device: of the weights.

    Raises:
        DraftReportError: it cannot be read, or weights are missing.
    """
    origin = {"revision": files.revision, "trust_remote_code": files.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(files.base_model, **origin)
        model, info = AutoModelForCausalLM.from_pretrained(
            files.base_model,
            output_loading_info=True,
            dtype=dtype,
            device_map={"": device},
            **origin,
            attn_implementation=default_attention(config),
        )
        if info["missing_keys"]:  # transformers would leave them at random numbers
            raise ValueError(f"not in the checkpoint: {sorted(info['missing_keys'])[:5]}")
        grow_to(model, num_tokens)
        if files.adapter is not None:
            model = PeftModel.from_pretrained(model, files.adapter).merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        where = files.base_model if files.adapter is None else files.adapter
        raise DraftReportError(
            f"{files.keys}: the student in {where!r} could not be loaded ({type(error).__name__}: "
            f"{reason}). Give a folder that holds a saved model, or train again."
        ) from None
    return model.requires_grad_(False).eval()
