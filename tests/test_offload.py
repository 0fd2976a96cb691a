"""A teacher that waits elsewhere: what is moved, when, and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from axolotl_skd.offload import WAITING_ROOM, Offloaded
from tests.helpers import save_model


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_the_head_leaves_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """There is one device here, so it is noted what would move."""
    model = save_model(tmp_path, tie_word_embeddings=tied)
    moved: list[tuple[nn.Module, torch.device]] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append((self, device)))
    offloaded = Offloaded(model)
    parts = [part for part, _ in moved]
    assert {device for _, device in moved} == {WAITING_ROOM}
    left = {id(p) for part in parts for p in part.parameters()}
    stayed = [name for name, p in model.named_parameters() if id(p) not in left]
    assert stayed == (["model.embed_tokens.weight"] if tied else ["lm_head.weight"])

    moved.clear()
    with pytest.raises(RuntimeError), offloaded.at_hand():
        assert moved == [(part, model.lm_head.weight.device) for part in parts]
        moved.clear()
        raise RuntimeError
    assert moved == [(part, WAITING_ROOM) for part in parts]
