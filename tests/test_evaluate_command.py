"""`axolotl skd eval`: which model, which settings, what is recorded, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_skd import before_after, evaluate_command
from axolotl_skd.cli import skd
from axolotl_skd.evaluation.models import EvalModel, EvalSettings
from axolotl_skd.resources import resource_path

TASK = "skd_tiny_arithmetic"
STUDENT = str(resource_path("example_configs") / "tiny" / "student")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(skd, ["eval", *map(str, arguments)])


def succeeds(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EvalModel, EvalSettings, list[str]]]:
    """What would have been given to lm-eval, whose result is an accuracy of one half."""
    made = []

    def fake(model: EvalModel, settings: EvalSettings, *, tasks: Any) -> dict[str, Any]:
        made.append((model, settings, list(tasks)))
        return {task: {"acc": 0.5} for task in tasks}

    monkeypatch.setattr(before_after, "run_tasks", fake)
    monkeypatch.setattr(evaluate_command, "run_tasks", fake)
    return made


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Of a finished run: a tokenizer and (empty) weights are in its folder."""
    out = tmp_path / "out"
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(out)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (out / name).touch()
    return {
        "base_model": STUDENT,
        "output_dir": str(out),
        "bf16": True,  # of the machine that trained; this one may not have it
        "distillation": {
            "teacher": {"base_model": "no/such/teacher"},
            "eval": {"tasks": [TASK], "limit": 3, "batch_size": 5, "at": ["start"]},
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(config: dict[str, Any]) -> Path:
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


# Configs


def test_the_trained_model_with_the_settings_of_the_config(
    ran: list, config: dict[str, Any], write: Any
) -> None:
    output = succeeds(write(config), "--device", "cpu")
    ((model, settings, tasks),) = ran
    out = config["output_dir"]
    assert model == EvalModel(base_model=out, tokenizer=out, device="cpu")
    assert settings == EvalSettings(limit=3, batch_size=5)
    assert tasks == [TASK]
    assert json.loads(Path(out, "eval_results.json").read_text()) == {"end": {TASK: {"acc": 0.5}}}
    assert "50.0%" in output and "eval_results.json" in output


def test_options_go_before_the_config(
    ran: list, config: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    succeeds(
        write(config),
        *("--tasks", f"skd_math_heldout, {TASK}", "--limit", 9, "--batch-size", 2),
        *("--no-apply-chat-template", "--device", "cpu", "--log-samples", tmp_path / "samples"),
        *("--output", tmp_path / "new" / "mine.json"),
    )
    ((_, settings, tasks),) = ran
    assert tasks == ["skd_math_heldout", TASK]
    assert settings == EvalSettings(
        limit=9, batch_size=2, apply_chat_template=False, log_samples=tmp_path / "samples"
    )
    assert set(json.loads((tmp_path / "new" / "mine.json").read_text())) == {"end"}


def test_before_and_after_by_hand(ran: list, config: dict[str, Any], write: Any) -> None:
    path = write({**config, "adapter": "lora"})
    succeeds(path, "--start", "--device", "cpu")
    output = succeeds(path, "--device", "cpu")
    assert [model.adapter for model, *_ in ran] == [None, config["output_dir"]]
    assert {model.base_model for model, *_ in ran} == {STUDENT}
    assert "+0.0" in output and "not comparable" not in output
    results = json.loads(Path(config["output_dir"], "eval_results.json").read_text())
    assert set(results) == {"start", "end"}
    assert "limit 3 before, 4 after" in succeeds(path, "--device", "cpu", "--limit", 4)


def test_the_start_needs_no_training(
    ran: list, config: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    """The tokenizer is set up as for training: here the config changes its template."""
    config |= {
        "plugins": ["axolotl_skd.SKDPlugin"],
        "datasets": [{"path": "no/such/data", "type": "chat_template"}],
        "chat_template": "chatml",
        **{"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3},
        "num_epochs": 1,
    }
    new = tmp_path / "new"
    path = write(config)
    succeeds(path, "--start", "--output-dir", new, "--device", "cpu")
    template = AutoTokenizer.from_pretrained(new).chat_template
    assert template != AutoTokenizer.from_pretrained(STUDENT).chat_template
    assert "<|im_start|>" in template
    assert (new / "eval_results.json").exists()
    assert "nothing has been trained yet" in refused(path, "--output-dir", new)


def test_a_config_without_our_block(ran: list, config: dict[str, Any], write: Any) -> None:
    del config["distillation"]
    path = write(config)
    assert "give --tasks" in refused(path)
    succeeds(path, "--tasks", TASK, "--device", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": None}, "has no base_model"),
        ({"output_dir": None}, "Give --output-dir"),
        ({"output_dir": "./nothing/here"}, "nothing has been trained yet"),
        ({"distillation": {"evals": {}}}, "Did you mean 'eval'"),
    ],
)
def test_configs_that_do_not_do(
    ran: list, config: dict[str, Any], write: Any, change: dict[str, Any], message: str
) -> None:
    assert message in refused(write({**config, **change}))
    assert ran == []


def test_configurations_without_weights_are_no_trained_model(
    ran: list, config: dict[str, Any], write: Any
) -> None:
    out = Path(config["output_dir"])
    (out / "config.json").touch()
    (out / "model.safetensors").unlink()
    assert "has no model*.safetensors" in refused(write(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "skd_gsm9k"], "did you mean"),
        (["--tasks", ","], "unknown evaluation task"),
        (["--limit", "0"], "not in the range"),
        (["--trust-remote-code"], "is for a model"),
        (["--backend", "vllm", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["--device", "cuda:99"], "--device cuda:99 is not there. Take one of: "),
    ],
)
def test_options_that_do_not_do(
    ran: list, config: dict[str, Any], write: Any, arguments: list[str], message: str
) -> None:
    assert message in refused(write(config), *arguments)
    assert ran == []


def test_missing_or_broken_configs(ran: list, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "gone.yml")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "is no YAML" in refused(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    assert "is no Axolotl config" in refused(tmp_path / "list.yaml")


# Models


def test_a_model(ran: list, tmp_path: Path) -> None:
    output = succeeds(STUDENT, "--tasks", TASK, "--device", "cpu", "--limit", 2)
    assert ran == [(EvalModel(base_model=STUDENT, device="cpu"), EvalSettings(limit=2), [TASK])]
    assert "value" in output and "50.0%" in output and "written" not in output
    target = tmp_path / "new" / "results.json"
    output = succeeds(STUDENT, "--tasks", TASK, "--device", "cpu", "--output", target)
    assert json.loads(target.read_text()) == {TASK: {"acc": 0.5}}
    assert f"written to {target}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([STUDENT], "give --tasks"),
        ([STUDENT, "--tasks", TASK, "--start"], "--start is for a config"),
        ([STUDENT, "--tasks", TASK, "--output-dir", "x"], "--output-dir is for a config"),
        (["./no/such", "--tasks", TASK], "neither a folder here"),
    ],
)
def test_models_that_do_not_do(ran: list, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)
    assert ran == []


def test_an_adapter_folder_for_real(tmp_path: Path) -> None:
    """An adapter that turns every answer into nothing: its base model alone would answer."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.fill_(3.0)
    adapted.save_pretrained(tmp_path / "adapter")
    target = tmp_path / "results.json"
    succeeds(
        *(tmp_path / "adapter", "--tasks", TASK, "--limit", 4, "--batch-size", 4),
        *("--device", "cpu", "--output", target),
    )
    metrics = json.loads(target.read_text())[TASK]
    assert metrics["has_answer"] == 0 and metrics["acc"] == 0
