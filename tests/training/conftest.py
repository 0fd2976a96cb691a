"""The random pair and the rows that all training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.harness import save_model, save_rows


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with student/, teacher/, train.jsonl (10 rows) and validation.jsonl (6 rows).

    The student's embeddings are tied to its head, as in Gemma and the small Qwens: its weight gets
    a gradient from inside the wrapped forward and one from the loss.
    """
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "student", seed=0, tied=True)
    save_model(folder / "teacher", seed=1, hidden=48, layers=3)
    save_rows(folder / "train.jsonl", 10)
    save_rows(folder / "validation.jsonl", 6, first=100)
    return folder
