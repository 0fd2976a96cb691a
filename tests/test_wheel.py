"""The wheel carries the evaluation tasks and example configs, inside the package and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
        "axolotl_skd/example_configs/tiny/teacher/model.safetensors",
        "axolotl_skd/example_configs/tiny/student/tokenizer.json",
    ):
        assert expected in names


def test_installed_wheel_finds_its_files(wheel: Path, tmp_path: Path) -> None:
    """Unpacked as pip would, away from the checkout: paths and tasks are those of the wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from axolotl_skd.resources import resource_path as path\n"
        "from axolotl_skd.evaluation.tasks import available_tasks\n"
        "print(path('evals')); print(path('example_configs')); print(available_tasks())"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    evals, examples, tasks = child.stdout.splitlines()
    assert Path(evals) == tmp_path / "axolotl_skd" / "evals"
    assert Path(examples) == tmp_path / "axolotl_skd" / "example_configs"
    assert "skd_tiny_arithmetic" in tasks
