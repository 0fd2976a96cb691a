"""The wheel carries the evaluation tasks and example configs, inside the package and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from axolotl_skd.evaluation.tasks import available_tasks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "axolotl_skd",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    for expected in (
        "axolotl_skd/plugin.py",
        "axolotl_skd/rollout/engine.py",
        "axolotl_skd/evals/skd_tiny_arithmetic/skd_tiny_arithmetic.yaml",
        "axolotl_skd/evals/skd_tiny_arithmetic/test.jsonl",
        "axolotl_skd/example_configs/skd_tiny.yml",
        "axolotl_skd/example_configs/paper/math_qwen_skd.yml",
        "axolotl_skd/example_configs/tiny/teacher/model.safetensors",
        "axolotl_skd/example_configs/tiny/student/tokenizer.json",
    ):
        assert expected in names
    assert not [name for name in names if "__pycache__" in name]


def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip: files, tasks, the command line's entry point and the plugin itself."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    code = """
from importlib.metadata import distribution
from axolotl_skd.resources import resource_path
from axolotl_skd.evaluation.tasks import available_tasks
import axolotl_skd
print(resource_path("evals"), resource_path("example_configs"), *available_tasks())
entry = next(e for e in distribution("axolotl-skd").entry_points if e.name == "skd")
print(entry.group, sorted(entry.load().commands))
print(axolotl_skd.SKDPlugin.__module__)
"""
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    package = target / "axolotl_skd"
    lines = [line for line in child.stdout.splitlines() if line.strip()]
    tasks = " ".join(available_tasks())
    assert f"{package / 'evals'} {package / 'example_configs'} {tasks}" in lines
    assert (package / "evals" / "skd_math" / "_boxed_answer").is_file()
    commands = ["eval", "keys", "path", "score", "speedup", "to-chat"]
    assert f"axolotl.cli_commands {commands}" in lines
    assert "axolotl_skd.plugin" in lines
