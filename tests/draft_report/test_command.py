"""`axolotl skd speedup` on random pairs: before and after, whole models and adapters, refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl.integrations.base import PluginManager
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from axolotl_skd.cli import skd
from axolotl_skd.draft_report import command
from axolotl_skd.draft_report.command import draft_report
from axolotl_skd.draft_report.errors import DraftReportError
from axolotl_skd.draft_report.options import ReportOptions
from axolotl_skd.draft_report.windows import rolls_back_windows
from tests.training.harness import base_config, save_model, save_rows, validation_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student, data and prompts."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "teacher", seed=1)
    save_model(folder / "student", seed=2)
    save_rows(folder / "train.jsonl", 12)
    save_rows(folder / "validation.jsonl", 6, first=50)
    (folder / "prompts.txt").write_text("What is 1 plus 1?\nWhy?\n")
    return folder


def write_config(path: Path, folder: Path, **overrides: Any) -> Path:
    defaults = {"output_dir": str(path / "out"), "rollout": {"stop_token_ids": []}}
    config = base_config(folder, **{**defaults, **overrides})
    (path / "config.yml").write_text(yaml.safe_dump(config))
    PluginManager.get_instance().plugins.clear()
    return path / "config.yml"


def run(config: Path, *arguments: str) -> Result:
    # Small: two prompts, one pass.
    options = ["--max-new-tokens", "8", "--repeats", "1", *arguments]
    return CliRunner().invoke(skd, ["speedup", str(config), *options])


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


def save_after(folder: Path, out: Path, source: str = "teacher") -> None:
    """A "trained" student: the teacher's own weights, which are always accepted."""
    AutoModelForCausalLM.from_pretrained(folder / source).save_pretrained(out)


def test_before_and_after(folder: Path, tmp_path: Path) -> None:
    save_after(folder, tmp_path / "out")
    config = write_config(tmp_path, folder)
    target = tmp_path / "new" / "report.json"
    result = run(
        config, "--prompts", str(folder / "prompts.txt"), "--json", "--output", str(target)
    )
    report = report_of(result)
    assert json.loads(target.read_text()) == report
    rows = {(row["student"], row["temperature"]): row for row in report["measurements"]}
    assert list(rows) == [("before", 0.0), ("before", 1.0), ("after", 0.0), ("after", 1.0)]
    for temperature in (0.0, 1.0):
        before, after = rows["before", temperature], rows["after", temperature]
        assert before["acceptance_rate"] < 0.9 < after["acceptance_rate"] == 1
        assert before["tokens_per_teacher_call"] < after["tokens_per_teacher_call"]
        assert len(before["speedups"]) == 1
    assert rows["before", 0.0]["equal_outputs"] == rows["after", 0.0]["equal_outputs"] == 1
    assert report["alpha"]["before"] < 0.9
    assert report["alpha"]["after"] == pytest.approx(1, abs=1e-5)
    assert report["settings"]["draft tokens"] == "3 (constant)"  # the config's
    assert report["settings"]["seed"] == 7
    assert not any("output_dir" in note for note in report["notes"])


def test_before_only_is_said_plainly_and_leaves_the_output_folder_alone(
    folder: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, folder)
    # What Axolotl writes before it trains.
    AutoModelForCausalLM.from_pretrained(folder / "student").config.save_pretrained(
        tmp_path / "out"
    )
    result = run(config, "--prompts", str(folder / "prompts.txt"), "--limit", "1")
    assert result.exit_code == 0, result.output
    assert "holds no trained student: before training only" in result.output
    lines = [line.split()[:2] for line in result.output.splitlines()]
    assert ["before", "greedy"] in lines and ["before", "sampled"] in lines
    assert not any(line[:1] == ["after"] for line in lines)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_adapter_is_merged_into_the_student(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "out")
    config = write_config(
        tmp_path, folder, adapter="lora", lora_r=4, lora_alpha=8, lora_target_modules=["q_proj"]
    )
    seen = measured_on(config, folder / "prompts.txt").students
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(seen["after"](ids).logits, adapted.eval()(ids).logits)
        difference = seen["after"](ids).logits - seen["before"](ids).logits
    assert difference.abs().max() > 1e-3
    assert not any("lora" in name for name, _ in seen["after"].named_modules())


@dataclass
class Measured:
    """What a report would be measured on."""

    students: dict[str, PreTrainedModel]
    prompts: list[list[int]]


def measured_on(config: Path, prompts: Path | None) -> Measured:
    calls: list[Measured] = []

    def spy(_teacher: Any, students: Any, prompts: Any, *_: Any, **__: Any) -> list[Any]:
        calls.append(Measured(students, prompts))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "measure", spy)
        draft_report(config, ReportOptions(prompts=prompts, max_new_tokens=4))
    return calls[0]


def test_padded_vocabularies(folder: Path, tmp_path: Path) -> None:
    """Widths 512 and 544, as Qwen2's differ."""
    wide = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    wide.resize_token_embeddings(544)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "wide")
    config = write_config(tmp_path, folder, teacher={"base_model": str(tmp_path / "wide")})
    report = report_of(run(config, "--prompts", str(folder / "prompts.txt"), "--json"))
    assert report["settings"]["vocabulary"] == 512
    plain = report_of(
        run(write_config(tmp_path, folder), "--prompts", str(folder / "prompts.txt"), "--json")
    )
    counts = [row["counts"] for row in report["measurements"]]
    assert counts == [row["counts"] for row in plain["measurements"]]


@pytest.mark.parametrize("validation", [True, False])
def test_the_configs_own_prompts_are_those_of_its_chat_rows(
    folder: Path, tmp_path: Path, validation: bool
) -> None:
    overrides = validation_set(folder) if validation else {}
    overrides["dataset_prepared_path"] = str(tmp_path / "prepared")
    config = write_config(tmp_path, folder, **overrides)
    name = "validation.jsonl" if validation else "train.jsonl"
    own, read = (measured_on(config, file) for file in (None, folder / name))
    assert sorted(own.prompts) == sorted(read.prompts)
    assert len(own.prompts) == (6 if validation else 12)


def test_long_prompts_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Why?\n" + "Why? " * 60 + "\n")
    config = write_config(tmp_path, folder)
    result = run(config, "--prompts", str(file))
    assert "1 of 2 prompts left out: longer than distillation.rollout.max_prompt" in result.output
    assert "prompts 1 of" in result.output
    file.write_text("Why? " * 60 + "\n")
    result = run(config, "--prompts", str(file))
    assert result.exit_code == 1
    assert (
        "all 1 prompts are longer than distillation.rollout.max_prompt_tokens (64)" in result.output
    )


def other_tokenizer(folder: Path, tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "other", seed=1)
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tokenizer))
    return {"teacher": {"base_model": str(tmp_path / "other")}}


def own_base(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"teacher": {"base_model": None, "student_base": True}, "adapter": "lora"}


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({"method": "sft"}, (), "distillation.method: sft has no teacher"),
        (other_tokenizer, (), "distillation.teacher.base_model of the student's family"),
        ({"teacher": {"base_model": "./nowhere"}}, (), "distillation.teacher.base_model: "),
        (own_base, (), "distillation.teacher.student_base: the teacher is the student's own base"),
        ({"teacher": {"device": "cuda:99"}}, (), "distillation.teacher.device: cuda:99"),
        ({}, ("--max-new-tokens", "250"), "has 256 positions. Lower --max-new-tokens"),
        ({}, ("--task", "skd_tiny_arithmetic"), "--prompts and --task are both given"),
    ],
)
def test_refusals(
    folder: Path, tmp_path: Path, overrides: Any, arguments: tuple[str, ...], message: str
) -> None:
    if callable(overrides):
        overrides = overrides(folder, tmp_path)
    config = write_config(tmp_path, folder, **overrides)
    result = run(config, "--prompts", str(folder / "prompts.txt"), *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not result.output.startswith("Traceback")


def test_a_window_that_a_draft_would_outgrow(folder: Path, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    config = MistralConfig(**{**student.config.to_dict(), "sliding_window": 20})
    MistralForCausalLM(config).save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(folder / "student").save_pretrained(tmp_path / "student")
    config = write_config(tmp_path, folder, base_model=str(tmp_path / "student"))
    result = run(config, "--prompts", str(folder / "prompts.txt"), "--max-new-tokens", "30")
    assert ("has a sliding window of 20" in result.output) is not rolls_back_windows()


def test_a_config_without_distillation(folder: Path, tmp_path: Path) -> None:
    config = base_config(folder, output_dir=str(tmp_path / "out"))
    del config["distillation"], config["plugins"]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    PluginManager.get_instance().plugins.clear()
    options = ReportOptions(prompts=folder / "prompts.txt")
    with pytest.raises(DraftReportError, match="no distillation: block"):
        draft_report(tmp_path / "config.yml", options)


def test_weights_of_the_after_student_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder)
    save_after(folder, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    result = run(config, "--prompts", str(folder / "prompts.txt"))
    assert result.exit_code == 1
    assert "output_dir: the student in" in result.output
