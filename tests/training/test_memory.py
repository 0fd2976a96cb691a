"""What a step keeps: the KV caches of its rollout are gone before the training forward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.rollout.cache import SlotCache, SlotLayer
from tests.training.harness import base_config, run_training


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What only a collector of cycles would free counts as kept."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("method", ["skd", "on_policy_kd"])
def test_caches_are_gone_before_the_training_forward(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    caches: list[weakref.ref[SlotCache]] = []
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[tuple[int, int]] = []
    init, allocate = SlotCache.__init__, SlotLayer.lazy_initialization

    def noted_init(self: SlotCache, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    def noted_allocate(self: SlotLayer, *args: Any) -> None:
        allocate(self, *args)
        tensors.extend((weakref.ref(self.keys), weakref.ref(self.values)))

    monkeypatch.setattr(SlotCache, "__init__", noted_init)
    monkeypatch.setattr(SlotLayer, "lazy_initialization", noted_allocate)

    def watch(trainer: Any) -> None:
        inner, complete = trainer.compute_loss, trainer.distiller.source.complete

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            alive.append(
                tuple(sum(ref() is not None for ref in refs) for refs in (caches, tensors))
            )
            return inner(*args, **kwargs)

        def completed(*args: Any) -> Any:
            made = len(caches)
            batches = complete(*args)
            assert len(caches) > made  # the watch sees those of the rollout
            return batches

        trainer.compute_loss = compute_loss
        trainer.distiller.source.complete = completed

    run_training(base_config(pair, method=method, max_steps=2), tmp_path, watch)
    assert tensors
    assert alive == [(0, 0), (0, 0)]
