"""Captured forwards: when they are captured, what is replayed, and what becomes of a failure.

`FakeCapture` behaves like a CUDA graph without a device: capturing computes nothing, replaying knows
only the tensors that it was given, and the result keeps its place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from axolotl_skd.rollout.cache import SlotCache
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.graphs import Forward, GraphedForwards, Replay
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, SamplingParams
from tests.rollout.tiny import STOP_IDS, one_thread, random_prompts, tiny_model


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


class FakeCapture:
    """Of `plus`, whose arithmetic it repeats."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, forward: Forward, inputs: tuple[Tensor, ...]) -> tuple[Replay, Tensor]:
        self.num_captures += 1
        output = torch.full_like(forward(*inputs), torch.nan)

        def replay() -> None:
            self.num_replays += 1
            output.copy_(2 * inputs[0] + inputs[1])

        return replay, output


class Plus:
    """2 a + b, counting its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.num_calls += 1
        return 2 * a + b


def nothing() -> None:
    """What is done when graphs are given up."""


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


# --- the life of a graph ----------------------------------------------------------------------


def test_plain_then_captured_then_replayed() -> None:
    capture, plus = FakeCapture(), Plus()
    graphed = GraphedForwards(lambda: capture, nothing)
    seen = []
    for step in range(5):
        a, b = numbers(step, 1.0), numbers(-1.0, step)
        assert torch.equal(graphed("key", plus, a, b), 2 * a + b)
        seen.append((plus.num_calls, capture.num_captures, capture.num_replays))
    assert seen == [(1, 0, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (2, 1, 4)]


def test_the_callers_tensors_are_its_own() -> None:
    """Later replays do not write into what was passed in earlier, nor read from it."""
    graphed, plus = GraphedForwards(FakeCapture, nothing), Plus()
    passed = [(numbers(step), numbers(10.0 * step)) for step in range(4)]
    for a, b in passed:
        graphed("key", plus, a, b)
        a += 100  # the caller goes on with its own
    assert [(float(a), float(b)) for a, b in passed] == [(100.0 + i, 10.0 * i) for i in range(4)]
    assert float(graphed("key", plus, numbers(7.0), numbers(1.0))) == 15


def test_keys_have_graphs_of_their_own() -> None:
    capture, plus = FakeCapture(), Plus()
    graphed = GraphedForwards(lambda: capture, nothing)
    for step in range(4):
        for size in (1, 3):
            a, b = torch.full((size,), float(step)), torch.arange(float(size))
            assert torch.equal(graphed(("rows", size), plus, a, b), 2 * a + b)
    assert (capture.num_captures, plus.num_calls) == (2, 4)


def test_results_of_other_keys_are_left_alone() -> None:
    graphed, plus = GraphedForwards(FakeCapture, nothing), Plus()
    for _ in range(3):
        kept = graphed("a", plus, numbers(1.0), numbers(1.0))
    for _ in range(3):
        graphed("b", plus, numbers(5.0), numbers(5.0))
    assert float(kept) == 3


def test_what_is_forgotten_is_captured_anew() -> None:
    capture, plus = FakeCapture(), Plus()
    graphed = GraphedForwards(lambda: capture, nothing)
    for _ in range(3):
        graphed("key", plus, numbers(1.0), numbers(2.0))
    graphed.forget()
    seen = []
    for _ in range(3):
        assert float(graphed("key", plus, numbers(3.0), numbers(4.0))) == 10
        seen.append((plus.num_calls, capture.num_captures))
    assert seen == [(3, 1), (4, 2), (4, 2)]  # plain first: it is seen for the first time


def test_a_cache_that_moves_forgets_its_graphs() -> None:
    capture, plus = FakeCapture(), Plus()
    graphed = GraphedForwards(lambda: capture, nothing)
    cache = SlotCache(num_layers=1, num_rows=4, num_slots=8, graphed=graphed)
    for _ in range(2):
        graphed("key", plus, numbers(1.0), numbers(2.0))
    cache.keep_rows(torch.tensor([0, 2]))
    for _ in range(2):
        graphed("key", plus, numbers(1.0), numbers(2.0))
    assert (capture.num_captures, plus.num_calls) == (2, 4)


# --- failure ----------------------------------------------------------------------------------


class FailingCapture(FakeCapture):
    """Captures `good` forwards, then no more."""

    def __init__(self, good: int = 0) -> None:
        super().__init__()
        self._good = good
        self.num_failures = 0

    def __call__(self, forward: Forward, inputs: tuple[Tensor, ...]) -> tuple[Replay, Tensor]:
        if self.num_captures == self._good:
            self.num_failures += 1
            forward(*inputs)  # gets half way, and has changed what it can change
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().__call__(forward, inputs)


@pytest.mark.parametrize("good", [0, 1])
def test_after_a_failure_all_is_plain(good: int, caplog: pytest.LogCaptureFixture) -> None:
    """Other keys too, and those that had been captured: said once, tried once."""
    capture, plus, given_up = FailingCapture(good), Plus(), []
    graphed = GraphedForwards(lambda: capture, lambda: given_up.append(True))
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            for size in (1, 2, 3):
                a, b = torch.full((size,), float(step)), torch.arange(float(size))
                assert torch.equal(graphed(size, plus, a, b), 2 * a + b)
    assert (capture.num_captures, capture.num_failures, len(given_up)) == (good, 1, 1)
    (record,) = caplog.records
    assert "capturing a forward failed (RuntimeError: operation not permitted" in record.message
    assert "cuda_graphs" in record.message
    # 15 calls, 1 + good of which were tried to be captured; no graph was ever replayed twice.
    assert plus.num_calls == 15 + 1
    assert capture.num_replays == good


def test_an_interrupt_is_no_failure_to_capture() -> None:
    def interrupted(forward: Forward, inputs: tuple[Tensor, ...]) -> tuple[Replay, Tensor]:
        raise KeyboardInterrupt

    graphed, plus = GraphedForwards(lambda: interrupted, nothing), Plus()
    graphed("key", plus, numbers(1.0), numbers(1.0))
    with pytest.raises(KeyboardInterrupt):
        graphed("key", plus, numbers(1.0), numbers(1.0))


class FailingForwardCapture:
    """Runs the forward as far as its end, as a capture does, and fails then."""

    def __init__(self, good: int) -> None:
        self._good = good

    def __call__(self, forward: Forward, inputs: tuple[Tensor, ...]) -> tuple[Replay, Tensor]:
        output = forward(*inputs)
        if not self._good:
            raise RuntimeError("out of graphs")
        self._good -= 1
        return lambda: output.copy_(forward(*inputs)), output


@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_rollout_goes_on_without_graphs(good: int, caplog: pytest.LogCaptureFixture) -> None:
    models = [tiny_model("llama", seed=seed, sharpness=5.0) for seed in (1, 2)]
    params = SamplingParams(3, 220, 1.0, 0.9, 0.7, 0.8, STOP_IDS)
    prompts = Prompts(
        tuple(map(torch.tensor, random_prompts(5, [1, 20, 7, 12]))),
        row_streams(3, 1, torch.arange(4)),
        torch.tensor([16, 16, 5, 16]),
    )

    def engine(capture: FailingForwardCapture | None) -> RolloutEngine:
        lms = (CausalLM(model, new_capture=capture and (lambda: capture)) for model in models)
        return RolloutEngine(*lms, fixed_shapes=True)

    def rollout(engine: RolloutEngine) -> list[list[int]]:
        return [ids.tolist() for ids in engine.interleave(prompts, params).unpadded()]

    expected = rollout(engine(None))
    assert not caplog.records
    failing = engine(FailingForwardCapture(good))
    assert [rollout(failing), rollout(failing)] == [expected, expected]
    assert 1 <= len(caplog.records) <= 2  # once per model, not per rollout
    assert all("without graphs, with the same tokens" in r.message for r in caplog.records)
