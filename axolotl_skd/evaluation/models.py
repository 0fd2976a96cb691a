"""What is evaluated and how: records, and how a folder or hub id becomes one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Backend = Literal["hf", "vllm"]

# What vLLM accepts as `max_lora_rank`.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class ModelNotFoundError(ValueError):
    """Neither a folder with a model nor a hub id, or an adapter without its base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalModel:
    """A saved model as lm-eval loads it.

    Attributes:
        base_model: folder or hub id of the full model.
        device: a torch device, e.g. `"cuda:0"` or `"cpu"`; vLLM takes the first visible GPU.
        revision: of the base model on the hub; None = the default branch.
        adapter: folder or hub id of a PEFT adapter on top of it, which is not merged.
        tokenizer: folder or hub id of the tokenizer; None = the base model's.
        trust_remote_code: run code that comes with the model.
        attn_implementation: transformers' name; None = its own choice. vLLM has its own.
    """

    base_model: str
    device: str
    revision: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How tasks are run.

    Attributes:
        limit: first rows per task, or their share if below 1; None = all rows.
        batch_size: rows per generation batch, or lm-eval's `"auto"`; vLLM batches by itself.
        apply_chat_template: wrap each question with the tokenizer's chat template.
        backend: of lm-eval.
        log_samples: folder for lm-eval's `samples_<task>_<time>.jsonl`; None = not kept.
    """

    limit: int | float | None = None
    batch_size: int | str = 8
    apply_chat_template: bool = True
    backend: Backend = "hf"
    log_samples: Path | None = None


def saved_model(name: str, device: str, trust_remote_code: bool = False) -> EvalModel:
    """A model folder or hub id; one with an `adapter_config.json` is put on its base model.

    Args:
        name: folder or hub id.
        device: a torch device.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelNotFoundError
    """
    source = os.path.expanduser(name)
    _check_exists(source)
    if _find(source, "adapter_config.json") is None:
        if _find(source, "config.json") is None:
            where = source
            if not os.path.isdir(source):
                where = (
                    f"there is no folder {source} here ({Path.cwd()}), and a model of that name on the "
                    "hub cannot be reached or"
                )
            raise ModelNotFoundError(
                f"{where} has neither config.json (a model) nor adapter_config.json (an adapter)."
            )
        return EvalModel(
            base_model=source,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=honest_attention(source),
        )
    config = adapter_config(source)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelNotFoundError(
            f"{source} is an adapter whose adapter_config.json names no base_model_name_or_path. "
            "Write the base model's folder or hub id there."
        )
    _check_exists(base, f" It is the base model of the adapter {source}.")
    return EvalModel(
        base_model=base,
        device=device,
        revision=config.get("revision"),
        adapter=source,
        tokenizer=source if _find(source, "tokenizer_config.json") else None,
        trust_remote_code=trust_remote_code,
        attn_implementation=honest_attention(base),
    )


def honest_attention(base_model: str) -> str | None:
    """`EvalModel.attn_implementation` of a folder or hub id.

    Eager where attention scores are softcapped (Gemma-2), which transformers' default leaves out.
    """
    path = _find(base_model, "config.json")
    config = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return "eager" if config.get("attn_logit_softcapping") else None


def _check_exists(name: str, hint: str = "") -> None:
    if not os.path.isdir(name) and not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"{name!r} is neither a folder here ({Path.cwd()}) nor a hub id (`name` or "
            f"`owner/name`).{hint}"
        )


def adapter_config(adapter: str) -> dict[str, Any]:
    """The `adapter_config.json` of a PEFT adapter.

    Raises:
        ModelNotFoundError: if there is none.
    """
    path = _find(adapter, "adapter_config.json")
    if path is None:
        raise ModelNotFoundError(f"{adapter} has no adapter_config.json.")
    return json.loads(path.read_text(encoding="utf-8"))


def vllm_lora_rank(config: Mapping[str, Any]) -> int:
    """The least `max_lora_rank` of vLLM that holds an adapter.

    Args:
        config: the adapter's `adapter_config.json`.

    Raises:
        ValueError: if vLLM has none so large.
    """
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    for allowed in _VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(
        f"the adapter has rank {rank}, and vLLM takes at most {_VLLM_RANKS[-1]}. Use the backend hf."
    )


def _find(source: str, file: str) -> Path | None:
    """A file of a folder, or of a hub repository (fetched); None if it has none."""
    if os.path.isdir(source):
        path = Path(source, file)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(source, file))
    except EntryNotFoundError:  # also where there is no network and the cache lacks the file
        return None
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{source} is no folder here and no model on the hub, or one without access to it."
        ) from error
