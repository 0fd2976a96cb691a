"""FSDP2's gathering on two CPU ranks: tokens, losses and weights as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.fsdp2_ranks import CASES
from tests.training.harness import largest_difference, save_model
from tests.training.test_ranks import start


@pytest.mark.ranks
def test_spread_by_fsdp2_as_whole(pair: Path, tmp_path: Path) -> None:
    """Three steps of a mixture, with ragged rollouts and rows about which one rank asks the teacher.

    Equal losses of the later steps say that the weights are gathered anew for each.
    """
    (tmp_path / "student").symlink_to(pair / "student")
    (tmp_path / "teacher").symlink_to(pair / "teacher")
    save_model(tmp_path / "student_untied", seed=0)
    child = start(2, "tests.training.fsdp2_ranks", str(tmp_path), str(tmp_path))
    assert child.returncode == 0, child.stdout[-6000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]

    for case in CASES:
        first, second = (rank[case] for rank in ranks)
        by_layer = case[1]
        assert (first["whole_layers"] == 1) == by_layer
        for here, there in zip(first["steps"], second["steps"], strict=True):
            assert here["tokens"] + there["tokens"] == here["expected_tokens"]
            assert here["loss"] + there["loss"] == pytest.approx(here["expected_loss"], rel=1e-6)
        assert len({str(step["tokens"]) for step in first["steps"]}) == len(first["steps"])
        whole = sum(weight.numel() for weight in first["expected"].values())
        assert first["elements"] + second["elements"] == whole
        assert largest_difference(first["weights"], first["expected"]) < 1e-6
        for rank in (first, second):
            assert rank["validation"][0] == pytest.approx(rank["validation"][1], rel=1e-6)
