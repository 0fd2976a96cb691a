"""The example configs: their generator, the figures of the paper, the commands of their headers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_skd.evaluation.tasks import check_tasks
from axolotl_skd.methods import METHODS, LossRecipe, Method, Share
from axolotl_skd.resources import resource_path
from axolotl_skd.rollout.types import Source
from example_configs.make_configs import all_files

FOLDER = resource_path("example_configs")
# Section 4.1 and appendix C: task -> (prompt, new) tokens, steps, the teacher's top-p, steps of three
# epochs of 8 rows for the teacher and for the student.
PAPER = {
    "translation": ((256, 256), 1225, 1.0, 375, 375),
    "summarization": ((1024, 128), 375, 0.5, 3750, 375),
    "gsm8k": ((256, 512), 375, 1.0, 2625, 375),
    "math": ((1024, 1024), 375, 1.0, 3750, 375),
}
MODELS = {
    "gemma": ("google/gemma-7b-it", "google/gemma-2b-it"),
    "qwen": ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-0.5B-Instruct"),
}
DISTILLATION = {("gsm8k", "gemma"): "skd_gemma2b", ("gsm8k", "qwen"): "skd_qwen0.5b"}
PAIRS = [(task, family) for task in PAPER for family in MODELS]


def text(name: str) -> str:
    return (FOLDER / f"{name}.yml").read_text(encoding="utf-8")


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


def names(task: str, family: str) -> tuple[str, str, str]:
    """Files of the teacher's and the student's fine-tuning and of distillation."""
    stem = f"paper/{task}_{family}"
    skd = DISTILLATION.get((task, family), f"{stem}_skd")
    return f"{stem}_teacher_sft", f"{stem}_student_sft", skd


def test_the_committed_files_are_what_is_written() -> None:
    paths = [*FOLDER.glob("*.yml"), *FOLDER.glob("paper/*")]
    committed = {path.relative_to(FOLDER).as_posix(): path.read_text("utf-8") for path in paths}
    assert committed == all_files(), "run: python -m example_configs.make_configs"


def test_every_method_has_a_config_for_the_tiny_pair() -> None:
    for method in METHODS:
        assert config(f"{method}_tiny")["distillation"]["method"] == method


def test_a_new_row_of_the_table_gets_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(Source.INTERLEAVED, LossRecipe.DIVERGENCE, "the data set first", share=Share.LATE)
    monkeypatch.setitem(METHODS, "late_skd", row)
    written = all_files()["late_skd_tiny.yml"]
    assert "# late_skd of the tiny pair: the data set first.\n" in written
    block = yaml.safe_load(written)["distillation"]
    assert block["method"] == "late_skd"
    assert block["rollout"] == config("skd_tiny")["distillation"]["rollout"]


@pytest.mark.parametrize(("task", "family"), PAIRS)
def test_figures_of_the_paper(task: str, family: str) -> None:
    (prompt, new), steps, top_p, teacher_steps, student_steps = PAPER[task]
    files = [config(name) for name in names(task, family)]
    teacher_sft, student_sft, skd = files
    assert skd["distillation"]["method"] == "skd"
    assert skd["distillation"]["rollout"] == {
        "max_prompt_tokens": prompt,
        "max_new_tokens": new,
        "num_draft_tokens": "auto",  # which changes no token
        "teacher_top_k": 25,
        "student_temperature": 0.5,
        "student_top_p": 0.5,
        "teacher_temperature": 0.2,
        "teacher_top_p": top_p,
    }
    assert skd["max_steps"] == steps
    assert skd["num_epochs"] * 1000 >= 8 * steps
    for sft, length in ((teacher_sft, teacher_steps), (student_sft, student_steps)):
        assert sft["distillation"] == {
            "method": "sft",
            "rollout": {"max_prompt_tokens": prompt},
        }
        assert sft["num_epochs"] == 3 and "max_steps" not in sft
        assert sft["eval_steps"] == length // 5
    for file in files:
        assert file["sequence_len"] == prompt + new
        assert file["micro_batch_size"] * file["gradient_accumulation_steps"] == 8
        assert (file["learning_rate"], file["warmup_ratio"]) == (1e-5, 0.1)
        assert file["lr_scheduler"] == "linear"
        assert file["model_config"] == {"attention_dropout": 0.1}
        assert file["load_best_model_at_end"] is True
    teacher, student = MODELS[family]
    assert [file["base_model"] for file in files] == [teacher, student, student]


@pytest.mark.parametrize(("task", "family"), PAIRS)
def test_stages_find_each_other(task: str, family: str) -> None:
    teacher_sft, student_sft, skd = names(task, family)
    expected = f"./{config(teacher_sft)['output_dir']}"
    assert config(skd)["distillation"]["teacher"]["base_model"] == expected
    assert config(student_sft)["datasets"] == config(skd)["datasets"]
    for name in (teacher_sft, student_sft):
        assert f"axolotl train example_configs/{name}.yml\n" in text(skd)
        assert config(name)["test_datasets"] == config(skd)["test_datasets"]
    other_start = re.findall(r"--base-model (\S+)", text(skd))
    # The paper's second start is for the tasks that are trained and tested alike (section 5.3).
    assert other_start == ([] if task == "math" else [config(student_sft)["output_dir"]])


def test_no_two_configs_write_to_one_folder() -> None:
    outputs = [yaml.safe_load(text)["output_dir"] for text in all_files().values()]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize(("task", "family"), PAIRS)
def test_the_evaluation_in_the_comments_exists(task: str, family: str) -> None:
    for name in names(task, family):
        (block,) = re.findall(r"^  # (eval: .*)$", text(name), re.MULTILINE)
        check_tasks(yaml.safe_load(block)["eval"]["tasks"])


# The data


def commands(name: str) -> list[str]:
    """The header's shell lines behind "The data"."""
    header = text(name).split("base_model:")[0].split("# The data")[1]
    return [line[4:] for line in header.splitlines() if line.startswith("#   ")]


def write_rows(path: Path, count: int, **fields: str) -> None:
    """JSON lines; `{i}` in a field is the number of the row."""
    path.write_text(
        "".join(
            json.dumps({key: value.replace("{i}", str(i)) for key, value in fields.items()}) + "\n"
            for i in range(count)
        )
    )


def release(task: str, folder: Path) -> None:
    """A stand-in for the raw data of a task, in the form and the size of the real one."""
    if task == "translation":
        for split, count in (("dev", 997), ("devtest", 1012)):
            (folder / split).mkdir()
            for language, words in (("asm_Beng", "অসম"), ("eng_Latn", 'a "word"')):
                lines = "".join(f"{words} {split} {i}\n" for i in range(count))
                (folder / split / f"{language}.{split}").write_text(lines, encoding="utf-8")
    elif task == "summarization":
        for split, count in (("train", 12460), ("dev", 500)):
            path = folder / f"dialogsum.{split}.jsonl"
            write_rows(path, count, dialogue=f"#Person1#: {split} {{i}}", summary="{i}")
    elif task == "gsm8k":
        write_rows(folder / "train.jsonl", 7473, question="{i}?", answer="<<1+1=2>>{i}\n#### {i}")
    else:  # what the download makes
        write_rows(folder / "ultrainteract.jsonl", 12000, instruction="Solve {i}", response="{i}")


# What the first row of validation becomes.
FIRST = {
    "translation": (
        "Translate Assamese sentence into English. This is the Assamese sentence: অসম devtest 0. "
        "Here is the English translation:",
        'a "word" devtest 0',
    ),
    "summarization": ("#Person1#: dev 0", "0"),
    "gsm8k": ("Q: 7000? \n\nA:", "7000\n#### 7000"),
    "math": ("Solve 10000", "10000"),
}
# Rows of the teacher, of the student, of validation.
ROWS = {
    "translation": (997, 997, 500),
    "summarization": (10000, 1000, 500),
    "gsm8k": (7000, 1000, 473),
    "math": (10000, 1000, 1000),
}


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment whose `axolotl skd` is ours without Axolotl, which takes seconds to start."""
    command = tmp_path / "bin" / "axolotl"
    command.parent.mkdir()
    call = "import sys; from axolotl_skd.cli import skd; skd(sys.argv[2:])"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{call}" "$@"\n')
    command.chmod(0o755)
    path = (
        f"{command.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("task", PAPER)
def test_the_commands_of_the_headers_make_the_data(
    task: str, tmp_path: Path, shell: dict[str, str]
) -> None:
    release(task, tmp_path)
    made = []
    for name in names(task, "gemma")[:2]:
        lines = commands(name)
        if task == "math":  # its two first lines, one command, download
            assert "load_dataset" in lines[0] and lines[1].endswith(
                '.to_json("ultrainteract.jsonl")\''
            )
            lines = lines[2:]
        subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=tmp_path, env=shell, check=True)
        for key in ("datasets", "test_datasets"):
            path = tmp_path / config(name)[key][0]["path"]
            made.append([json.loads(line)["messages"] for line in path.open(encoding="utf-8")])
    teacher, validation, student, again = made
    assert (len(teacher), len(student), len(validation)) == ROWS[task]
    assert validation == again
    assert tuple(message["content"] for message in validation[0]) == FIRST[task]
    prompts = {messages[0]["content"] for messages in validation}
    assert prompts.isdisjoint(messages[0]["content"] for messages in teacher + student)


@pytest.mark.parametrize(("task", "family"), PAIRS)
def test_all_stages_name_the_data_that_their_headers_make(task: str, family: str) -> None:
    for name in names(task, family):
        made = set(re.findall(r"(data/\S+\.jsonl)", "\n".join(commands(name))))
        assert made == {config(name)[key][0]["path"] for key in ("datasets", "test_datasets")}
