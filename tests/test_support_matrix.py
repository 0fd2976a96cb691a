"""The README's tables of students and of scaling are those of their scripts, whose cells can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def test_the_readme_has_the_table_of_the_scaling_script() -> None:
    assert script("scaling.py").table() in README


def test_scaling_follows_its_formulas() -> None:
    """By hand: one GPU, a teacher that is bound by reading, nothing to exchange."""
    scaling = script("scaling.py")
    student = scaling.Model("s", 1e9, 10, 1000, 2, 50, 1000)
    teacher = scaling.Model("t", 8e9, 20, 2000, 4, 50, 1000)
    device = scaling.Device(bandwidth=1e12, speed=1e15, node_link=1e11, wide_link=1e10, memory=8e10)
    step = scaling.Step(rows=2, prompt=100, completion=200, draft=2, acceptance=0.5)
    alone = scaling.cost(student, teacher, 1, scaling.REPLICATED, step, device)
    kv = {"student": 4 * 10 * 2 * 50, "teacher": 4 * 20 * 4 * 50}
    slots = 2 * 200  # of both rows, half of their completions written
    rounds = 200 / 1.5
    draft = (2e9 + slots * kv["student"]) / 1e12
    check = (16e9 + slots * kv["teacher"]) / 1e12
    prefill = 2e9 / 1e12 + 16e9 / 1e12
    assert alone.rollout == pytest.approx(prefill + rounds * (2 * draft + check))
    products = 8 * 1e9 * 600 + 2 * 1000 * 2000 * 400
    assert alone.training == pytest.approx(products / 1e15 + 28e9 / 1e12)
    assert alone.exchange == 0
    packed = scaling.cost(student, teacher, 1, scaling.FOUR_BIT, step, device)
    unpacking = (4.5e9 + 16e9) / 1e12
    assert packed.rollout == pytest.approx(alone.rollout + (1 + rounds) * unpacking)
    assert alone.memory - packed.memory == pytest.approx(16e9 - 4.5e9)
    spread = scaling.cost(student, teacher, 8, scaling.SHARDED, step, device)
    assert spread.rollout == alone.rollout
    assert spread.exchange == pytest.approx(7 / 8 * (8e9 + 16e9) / 1e11)
    # Whole in the rollout all the same, beside the part of it: what the optimizer holds is spread.
    assert alone.memory - spread.memory == pytest.approx(7 / 8 * 16e9 - 16e9 / 8)
    layers = scaling.cost(student, teacher, 8, scaling.BY_LAYER, step, device)
    fetching = 7 / 8 * 16e9 / 1e11  # in every forward
    assert layers.rollout == pytest.approx(alone.rollout + (1 + rounds) * fetching)
    assert layers.exchange == pytest.approx(7 / 8 * 8e9 / 1e11)
    head = 2 * 1000 * 2000
    whole = 2 * head + (16e9 - 2 * head) / 20
    assert spread.memory - layers.memory == pytest.approx(16e9 - whole)


def test_the_sizes_on_paper_are_those_of_the_models() -> None:
    """A token's keys and values, against a real cache."""
    scaling = script("scaling.py")
    keys = torch.empty(24, 2, 2, 64, dtype=torch.bfloat16)  # layers, keys and values, heads, size
    assert scaling.PAIRS[0][0].kv == keys.nbytes
