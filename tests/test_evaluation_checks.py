"""An evaluation that could not be made is refused before training, by its key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest

from axolotl_skd import evaluation_checks
from axolotl_skd.config_blocks import EvalConfig
from axolotl_skd.evaluation import needs
from axolotl_skd.evaluation.data_sources import DataSource, DataUnavailableError
from axolotl_skd.evaluation_checks import check_evaluation, check_evaluation_inputs
from axolotl_skd.preflight import ConfigConflictError

WITH_TEMPLATE = SimpleNamespace(chat_template="{{ messages }}")


def settings(*tasks: str, **keys: Any) -> EvalConfig:
    return EvalConfig(tasks=tasks or ("skd_tiny_arithmetic",), **keys)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKD_DATA_DIR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SKD_COMET_CHECKPOINT", raising=False)
    monkeypatch.delenv("SKD_COMET_PYTHON", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            evaluation_checks.LOG, level, lambda text, *args: lines.append(text % args)
        )
    return lines


def test_what_can_be_made_passes(said: list[str]) -> None:
    check_evaluation({}, settings())
    check_evaluation_inputs(settings(), WITH_TEMPLATE)
    check_evaluation_inputs(
        settings(apply_chat_template=False), SimpleNamespace(chat_template=None)
    )
    assert said == []


def refused(cfg: dict[str, Any], config: EvalConfig) -> str:
    with pytest.raises(ConfigConflictError) as refusal:
        check_evaluation(cfg, config)
    return str(refusal.value)


def test_unknown_tasks() -> None:
    message = refused({}, settings("skd_gsm9k"))
    assert message.startswith("distillation.eval.tasks: unknown evaluation task: 'skd_gsm9k' (did")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    message = refused({}, settings("skd_gsm8k", "skd_svamp"))
    assert message.startswith("distillation.eval.tasks: skd_gsm8k: SKD_DATA_DIR is")
    assert "gsm8k/test.jsonl" in message and "svamp/SVAMP.json" in message


def test_vllm_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == "vllm" else object())
    message = refused({}, settings(backend="vllm"))
    assert message.startswith("distillation.eval.backend: ") and "pip install vllm" in message


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"peft_use_dora": True}, "peft_use_dora: True"),
        ({"lora_modules_to_save": ["embed_tokens"]}, "lora_modules_to_save"),
        ({"lora_r": 1024}, "rank 1024"),
    ],
)
def test_adapters_that_vllm_does_not_load(
    cfg: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_checks, "check_backend", lambda _: None)
    message = refused({"adapter": "lora", **cfg}, settings(backend="vllm"))
    assert message.startswith("distillation.eval.backend: ") and named in message
    check_evaluation(cfg, settings(backend="vllm"))
    check_evaluation({"adapter": "lora", **cfg}, settings())
    check_evaluation({"adapter": "lora", "lora_r": 16}, settings(backend="vllm"))


def test_no_chat_template() -> None:
    with pytest.raises(ConfigConflictError, match=r"Set chat_template:, or .*chat_template: false"):
        check_evaluation_inputs(settings(), SimpleNamespace(chat_template=None))


def test_the_hub_and_missing_comet_are_said(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataSource, "load", lambda _: [])
    check_evaluation_inputs(settings("skd_flores_asm_eng", "skd_gsm8k"), WITH_TEMPLATE)
    comet, hub = said
    assert "COMET will be missing" in comet and "Unbabel/wmt22-comet-da" in comet
    assert hub.endswith("come from the hub: openlanguagedata/flores_plus, openai/gsm8k")
    monkeypatch.setenv("RANK", "1")
    check_evaluation_inputs(settings("skd_flores_asm_eng"), WITH_TEMPLATE)
    assert len(said) == 2


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: DataSource) -> None:
        raise DataUnavailableError("could not load it")

    monkeypatch.setattr(DataSource, "load", unreachable)
    with pytest.raises(ConfigConflictError, match="distillation.eval.tasks: could not load it"):
        check_evaluation_inputs(settings("skd_gsm8k"), WITH_TEMPLATE)
