"""A teacher that waits elsewhere: what is fetched, when, and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from axolotl_skd.offload import Offloaded
from tests.helpers import save_model

IDS = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_the_head_leaves_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """There is one device here: what is fetched is known by lying elsewhere in its memory."""
    monkeypatch.setattr(Offloaded, "_fetched", lambda _self, waiting: waiting.clone())
    model = save_model(tmp_path, tie_word_embeddings=tied)
    expected = model(IDS).logits
    at_home = places(model)
    offloaded = Offloaded(model)
    waiting = places(model)
    stayed = {name for name, place in waiting.items() if place == at_home[name]}
    assert stayed == {"model.embed_tokens.weight" if tied else "lm_head.weight"}

    with pytest.raises(RuntimeError), offloaded.at_hand():
        fetched = places(model)
        assert {name for name in waiting if fetched[name] == waiting[name]} == stayed
        assert torch.equal(model(IDS).logits, expected)
        raise RuntimeError
    assert places(model) == waiting, "let go of, not copied back"


def places(model: torch.nn.Module) -> dict[str, int]:
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}
