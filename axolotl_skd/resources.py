"""Where the folders that ship with the package are found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent


def resource_path(name: Literal["evals", "example_configs"]) -> Path:
    """The folder of the bundled lm-eval tasks (`evals`) or of the examples (`example_configs`).

    An installed wheel carries both inside the package. In a source checkout (editable install) they
    lie beside it.

    Raises:
        FileNotFoundError: if the folder is in neither place.
    """
    bundled = _PACKAGE / name
    if bundled.is_dir():
        return bundled
    root = _PACKAGE.parent
    # Without this check a stranger's `site-packages/evals` would be taken for ours.
    if (root / "pyproject.toml").is_file() and (root / name).is_dir():
        return root / name
    raise FileNotFoundError(
        f"axolotl_skd's folder {name!r} was found neither at {bundled} (installed wheel) nor at "
        f"{root / name} beside a pyproject.toml (source checkout). Reinstall the package: "
        "`pip install --force-reinstall --no-deps axolotl-skd`, or in a checkout "
        "`pip install -e .`."
    )
