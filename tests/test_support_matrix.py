"""The README's table of students is that of its script, whose cells can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.rollout.tiny import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def script(path: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "evals" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return script("support_matrix.py")


def table_rows(text: str) -> list[list[str]]:
    """Cells of all lines of Markdown tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readme_lists_what_the_script_knows(matrix: ModuleType) -> None:
    block = README[README.index(matrix.START) : README.index(matrix.END)]
    assert matrix.COMMAND in block
    head, _, *rows = table_rows(block)
    assert head[2:] == list(matrix.CELLS)
    count = len(matrix.FAMILIES)
    assert [row[:2] for row in rows[:count]] == [
        [family.name, f"`{family.model_type}`"] for family in matrix.FAMILIES.values()
    ]
    refused = rows[count + 2 :]
    assert [row[0] for row in refused] == list(matrix.REFUSED)


def test_every_family_of_the_exactness_tests_is_in_the_matrix(matrix: ModuleType) -> None:
    own_names = {"gemma3": "gemma3_text", "qwen2_window": "qwen2"}
    assert {own_names.get(name, name) for name in FAMILIES} == set(matrix.FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "cell"),
    [
        ("gemma2", "tied head"),
        ("smollm3", "new tokens"),
        ("qwen3_moe", "DoRA"),
        ("cohere2", "QLoRA"),
    ],
)
def test_a_sample_of_cells(matrix: ModuleType, tmp_path: Path, model_type: str, cell: str) -> None:
    assert matrix.run_cell(matrix.FAMILIES[model_type], cell, tmp_path / "run") == "yes"


def test_a_cell_fails_where_the_loss_is_another(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs = matrix._logprobs
    monkeypatch.setattr(matrix, "_logprobs", lambda lm, ids: logprobs(lm, ids.flip(0)))
    got = matrix.run_cell(matrix.FAMILIES["llama"], "full", tmp_path / "run")
    assert got == "no (CellError)"


@pytest.mark.parametrize(
    ("cell", "without"),
    [
        ("checkpointing", "gradient_checkpointing"),
        ("QLoRA", "load_in_4bit"),
        ("DoRA", "peft_use_dora"),
        ("bf16, fp32 masters", "fp32_master_weights"),
        ("compile", "torch_compile"),
    ],
)
def test_a_cell_fails_where_its_setting_has_no_effect(
    matrix: ModuleType, tmp_path: Path, cell: str, without: str
) -> None:
    keys = {key: value for key, value in matrix.CELLS[cell].items() if key != without}
    if without == "load_in_4bit":
        keys["adapter"] = "lora"
    family = matrix.FAMILIES["llama"]
    assert matrix.run_cell(family, cell, tmp_path / "run", keys) == "no (CellError)"


@pytest.mark.parametrize("name", ["Mamba", "Jamba", "RWKV", "Falcon-H1", "LFM2"])
def test_a_refusal_comes_before_weights_are_looked_for(
    matrix: ModuleType, tmp_path: Path, name: str
) -> None:
    assert matrix.run_refusal(*matrix.REFUSED[name], tmp_path) in README


def test_what_is_not_refused_is_said(matrix: ModuleType, tmp_path: Path) -> None:
    with pytest.raises((matrix.CellError, OSError)):  # it looks for weights
        matrix.run_refusal("llama", {}, tmp_path)


def test_marks_bound_what_is_replaced(matrix: ModuleType) -> None:
    text = f"before\n{matrix.START}\nold\n{matrix.END}\nafter\n"
    assert matrix.put_between_marks(text, "new") == "before\nnew\nafter\n"
    with pytest.raises(ValueError, match="once"):
        matrix.put_between_marks("nothing", "new")
