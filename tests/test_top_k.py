"""K over a run: schedules by hand, the controller's limits, sums over ranks, the checkpoint."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest
from torch import Tensor
from transformers import TrainerControl, TrainerState

from axolotl_skd.callbacks import TopKStateCallback
from axolotl_skd.top_k import ScheduledTopK, TargetAcceptance


def alone(counts: Tensor) -> Tensor:
    return counts


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [100, 78, 55, 32, 10]),  # 100 - 90 s; 77.5 and 32.5 go to the even number
        ("cosine", [100, 87, 55, 23, 10]),  # 10 + 90 (1 + cos(pi s)) / 2: 86.8 and 23.2
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[int]) -> None:
    policy = ScheduledTopK(100, 10, schedule)
    assert [policy.choose(share) for share in (0, 0.25, 0.5, 0.75, 1)] == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(1, 500), (500, 1), (7, 7), (3, 4)])
def test_a_schedule_stays_between_its_ends_and_never_turns(
    schedule: str, start: int, end: int
) -> None:
    policy = ScheduledTopK(start, end, schedule)
    values = [policy.choose(step / 200) for step in range(201)]
    assert (values[0], values[-1]) == (start, end)
    assert values == sorted(values, reverse=start > end)


def test_a_schedule_does_not_listen() -> None:
    policy = ScheduledTopK(5, 50)
    policy.observe(0, 1000)
    assert policy.choose(0.0) == 5


# --- the controller ---------------------------------------------------------------------------


def test_a_step_by_hand() -> None:
    """log K <- log 20 + (.8 - .5): 20 e^.3 = 27.0"""
    controller = TargetAcceptance(0.8, 20, 1000, alone)
    assert controller.choose(0.0) == 20
    controller.observe(50, 100)
    assert controller.log_top_k == pytest.approx(math.log(20) + 0.3)
    assert controller.choose(0.9) == 27
    controller.observe(90, 100)
    assert controller.choose(0.9) == 24  # 27.0 e^-.1


def test_nothing_verified_teaches_nothing() -> None:
    controller = TargetAcceptance(0.8, 20, 1000, alone)
    controller.observe(0, 0)
    assert controller.choose(0.0) == 20


def test_the_limits_of_k() -> None:
    """K neither falls below 1 nor rises above the vocabulary, and comes back at once from there."""
    low, high = (TargetAcceptance(target, 20, 300, alone) for target in (0.0, 1.0))
    for _ in range(100):
        low.observe(10, 10)
        high.observe(0, 10)
    assert (low.choose(0), high.choose(0)) == (1, 300)
    for controller in (low, high):
        before = controller.log_top_k
        controller.observe(*((10, 10) if controller is high else (0, 10)))
        # At its limit a target of 0 or 1 has nowhere else to go.
        assert controller.log_top_k == before
    low = TargetAcceptance(0.5, 1, 300, alone)
    for _ in range(100):
        low.observe(10, 10)
    low.observe(0, 10)
    assert low.log_top_k == 0.5  # not wound up by the hundred steps before


@pytest.mark.parametrize(("target", "expected"), [(0.0, 1), (1.0, 300)])
def test_targets_of_none_and_all(target: float, expected: int) -> None:
    """A rate that rises with K up to 1 at K = V = 300."""
    controller = TargetAcceptance(target, 25, 300, alone)
    for _ in range(4000):
        rate = math.log(controller.choose(0) + 1) / math.log(301)
        controller.observe(round(1000 * rate), 1000)
    assert controller.choose(0) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("window", [100, 5000])
def test_it_finds_and_holds_the_rate(target: float, window: int) -> None:
    """Proposals whose rank is at most K with probability log(K + 1) / log 301."""
    rng = random.Random(1)
    controller = TargetAcceptance(target, 2, 300, alone)
    rates = []
    for _ in range(400):
        probability = math.log(controller.choose(0) + 1) / math.log(301)
        accepted = sum(rng.random() < probability for _ in range(window))
        controller.observe(accepted, window)
        rates.append(accepted / window)
    # The sum of the deviations of the last 300 steps is what log K moved: at most log 300.
    assert abs(sum(rates[100:]) / 300 - target) <= math.log(300) / 300 + 1e-9
    assert abs(sum(rates[100:]) / 300 - target) < 0.01


def test_every_rank_takes_the_k_of_all() -> None:
    counts = [(10, 100), (300, 300)]

    def summed(_: Tensor) -> Tensor:
        return Tensor([310, 400]).long()

    ranks = [TargetAcceptance(0.5, 20, 1000, summed) for _ in counts]
    for rank, (accepted, verified) in zip(ranks, counts, strict=True):
        rank.observe(accepted, verified)
    whole = TargetAcceptance(0.5, 20, 1000, alone)
    whole.observe(310, 400)
    assert ranks[0].log_top_k == ranks[1].log_top_k == whole.log_top_k


def test_a_rank_without_rollouts_takes_part_in_the_sum() -> None:
    """Or the others would wait for it for ever."""
    heard: list[list[int]] = []

    def summed(counts: Tensor) -> Tensor:
        heard.append(counts.tolist())
        return Tensor([5, 10]).long()

    controller = TargetAcceptance(0.5, 20, 1000, summed)
    controller.observe(0, 0)
    assert heard == [[0, 0]] and controller.choose(0) == 20


# --- the checkpoint ---------------------------------------------------------------------------


def test_its_state_survives_the_trainers_json(tmp_path) -> None:
    controller = TargetAcceptance(0.8, 20, 1000, alone)
    for accepted in (71, 12, 93):
        controller.observe(accepted, 97)
    state, control = TrainerState(), TrainerControl()
    TopKStateCallback(controller).on_step_end(None, state, control)
    state.save_to_json(tmp_path / "trainer_state.json")
    loaded = TrainerState.load_from_json(tmp_path / "trainer_state.json")
    resumed = TargetAcceptance(0.8, 20, 1000, alone)
    TopKStateCallback(resumed).on_train_begin(None, loaded, control)
    assert resumed.log_top_k == controller.log_top_k  # bit by bit
    assert json.dumps(asdict(loaded))  # and it is still plain JSON


def test_a_fresh_run_begins_at_the_start() -> None:
    controller = TargetAcceptance(0.8, 20, 1000, alone)
    TopKStateCallback(controller).on_train_begin(None, TrainerState(), TrainerControl())
    assert controller.choose(0.0) == 20
