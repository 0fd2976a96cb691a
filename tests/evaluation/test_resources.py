from __future__ import annotations

from pathlib import Path

import pytest

from axolotl_skd import resources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package folder that `resource_path` takes for its own."""
    folder = tmp_path / "axolotl_skd"
    folder.mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", folder)
    return folder


def test_the_bundled_folders_are_found() -> None:
    assert (resources.resource_path("evals") / "skd_tiny_arithmetic").is_dir()
    assert resources.resource_path("example_configs").is_dir()


def test_an_installed_wheel_has_the_folders_inside_the_package(package: Path) -> None:
    (package / "evals").mkdir()
    (package.parent / "evals").mkdir()
    (package.parent / "pyproject.toml").touch()
    assert resources.resource_path("evals") == package / "evals"


def test_a_checkout_has_them_beside_the_package(package: Path) -> None:
    (package.parent / "evals").mkdir()
    (package.parent / "pyproject.toml").touch()
    assert resources.resource_path("evals") == package.parent / "evals"


def test_another_project_in_site_packages_is_not_ours(package: Path) -> None:
    (package.parent / "evals").mkdir()
    with pytest.raises(FileNotFoundError, match="'evals'.*Reinstall"):
        resources.resource_path("evals")
