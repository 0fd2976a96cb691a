"""Settings for the tests of evaluation."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_comet_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that point to the user's own COMET would take the place of what is tested."""
    for name in ("CHECKPOINT", "ENCODER", "PYTHON"):
        monkeypatch.delenv(f"SKD_COMET_{name}", raising=False)
