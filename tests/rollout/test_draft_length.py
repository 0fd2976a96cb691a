"""The draft length: the adaptive policy comes to the brute-force optimum of simulated devices.

The simulation plays rounds whose durations follow given cost functions and whose acceptance is the
expectation of a given rate; what the policy should choose is found by trying every length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from axolotl_skd.rollout.draft_length import (
    MAX_DRAFT_TOKENS,
    AdaptiveDraftLength,
    DraftLength,
    FixedDraftLength,
    MeasuredCost,
    RoundReport,
    expected_tokens,
    local_line,
)

FAR = 10_000  # tokens to go, more than any draft


# --- expected_tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_expected_tokens_is_the_geometric_sum(rate: float, num_draft_tokens: int) -> None:
    closed = (1 - rate**num_draft_tokens) / (1 - rate)
    assert expected_tokens(rate, num_draft_tokens) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 16])
def test_expected_tokens_in_the_limits(num_draft_tokens: int) -> None:
    """Nothing accepted: the replacement alone. All accepted: no bonus token."""
    assert expected_tokens(0.0, num_draft_tokens) == 1
    assert expected_tokens(1.0, num_draft_tokens) == num_draft_tokens


# --- costs ------------------------------------------------------------------------------------


def cost_of(samples: dict[int, list[float]]) -> MeasuredCost:
    cost = MeasuredCost()
    for size, durations in samples.items():
        for seconds in durations:
            cost.add(size, seconds)
    return cost


def test_a_line_is_recovered() -> None:
    cost = cost_of({size: [0.3 + 0.02 * size] for size in (8, 16, 40, 100)})
    for near in (1, 8, 30, 1000):
        assert local_line(cost.medians(), near) == pytest.approx((0.3, 0.02))


def test_outliers_do_not_move_the_line() -> None:
    """Two of five measurements of every size a hundred times as long, or next to nothing."""
    cost = cost_of(
        {s: [10.0 * s, 0.3 + 0.02 * s, 0.0, 0.3 + 0.02 * s, 0.3 + 0.02 * s] for s in (4, 8, 20)}
    )
    assert local_line(cost.medians(), 8) == pytest.approx((0.3, 0.02))


def test_what_was_long_ago_is_forgotten() -> None:
    cost = cost_of({40: [9.0] * 200})
    for _ in range(50):
        for size in (4, 8, 20):
            cost.add(size, 0.3 + 0.02 * size)
    assert local_line(cost.medians(), 8) == pytest.approx((0.3, 0.02))


@pytest.mark.parametrize(
    "seconds",
    [
        {1: 3.0, 2: 2.0, 3: 1.0},  # falling: slope at least 0
        {10: 1.0, 20: 4.0, 30: 9.0},  # steeper than proportional: intercept at least 0
        {7: 0.0, 9: 0.0},
    ],
)
def test_neither_slope_nor_intercept_is_negative(seconds: dict[int, float]) -> None:
    """And where one is held at zero, the line still passes through the mean."""
    cost = cost_of({size: [value] for size, value in seconds.items()})
    intercept, slope = local_line(cost.medians(), 5)
    assert slope >= 0 and intercept >= -1e-12
    weights = {size: (min(size, 5) / max(size, 5)) ** 2 for size in seconds}
    mean_size = sum(w * size for size, w in weights.items()) / sum(weights.values())
    mean_seconds = sum(w * seconds[size] for size, w in weights.items()) / sum(weights.values())
    assert intercept + slope * mean_size == pytest.approx(mean_seconds)


def test_near_sizes_count_more_than_far_ones() -> None:
    """A CPU's teacher: 48, 83, 106, 228 ms for 1, 2, 8, 40 tokens. One line would give 66 for one."""
    medians = {1: 47.5, 2: 83.0, 8: 106.0, 40: 228.0}

    def at(size: int) -> float:
        intercept, slope = local_line(medians, size)
        return intercept + slope * size

    assert at(1) == pytest.approx(47.5, rel=0.25)
    assert at(8) == pytest.approx(106.0, rel=0.1)
    assert at(40) == pytest.approx(228.0, rel=0.02)


def test_one_size_alone_is_a_constant() -> None:
    assert local_line(cost_of({24: [0.5, 0.7, 0.6]}).medians(), 5) == pytest.approx((0.6, 0.0))


# --- FixedDraftLength -------------------------------------------------------------------------


def test_a_fixed_length_is_kept_whatever_happens() -> None:
    policy = FixedDraftLength(5)
    policy.observe(RoundReport(4, 5, 1.0, 1.0, 4, 0))
    assert [policy.choose(8, remaining) for remaining in (100, 6, 5, 4, 1)] == [5, 5, 5, 4, 1]


# --- AdaptiveDraftLength ----------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Seconds of a forward by the number of tokens fed."""

    student: Callable[[int], float]
    teacher: Callable[[int], float]

    def seconds(self, num_rows: int, num_draft: int) -> tuple[float, float]:
        return num_draft * self.student(num_rows), self.teacher(num_rows * num_draft)

    def best(self, num_rows: int, rate: float, most: int = MAX_DRAFT_TOKENS) -> int:
        """By trying all: seconds per committed token."""

        def price(num_draft: int) -> float:
            committed = sum(rate**i for i in range(num_draft))
            return sum(self.seconds(num_rows, num_draft)) / committed

        return min(range(1, most + 1), key=price)


def line(intercept: float, slope: float) -> Callable[[int], float]:
    return lambda num_tokens: intercept + slope * num_tokens


ROWS = 1000  # so that whole numbers of tokens are as good as expectations
DEVICES = {
    # A forward costs the same for any number of tokens, the teacher's 3 or 30 times the student's.
    "gpu": Device(line(1.0, 0), line(3.0, 0)),
    "gpu_far": Device(line(1.0, 0), line(30.0, 0)),
    # It costs as much as it has tokens; in the second the teacher hardly more than the student.
    "cpu": Device(line(0, 1 / ROWS), line(0, 8 / ROWS)),
    "cpu_near": Device(line(0, 1 / ROWS), line(0, 1.5 / ROWS)),
    "between": Device(line(0.5, 0.5 / ROWS), line(4.0, 1 / ROWS)),
}
RATES = (0.1, 0.3, 0.6, 0.9, 0.99)


def play(
    policy: DraftLength,
    device: Device,
    rate: float,
    rounds: int,
    num_rows: int = ROWS,
    remaining: int = FAR,
) -> list[int]:
    """What the policy chose, round by round."""
    chosen = []
    for _ in range(rounds):
        num_draft = policy.choose(num_rows, remaining)
        chosen.append(num_draft)
        verified = num_rows * sum(rate**i for i in range(num_draft))
        student, teacher = device.seconds(num_rows, num_draft)
        policy.observe(
            RoundReport(
                num_rows,
                num_draft,
                student,
                teacher,
                num_verified=round(verified),
                num_accepted=round(rate * verified),
            )
        )
    return chosen


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", DEVICES)
def test_it_comes_to_the_best_length(name: str, rate: float) -> None:
    device = DEVICES[name]
    chosen = play(AdaptiveDraftLength(), device, rate, rounds=30)
    assert set(chosen[-5:]) == {device.best(ROWS, rate)}


def test_the_devices_are_worth_something() -> None:
    """Short, middling and longest drafts are all somewhere the best."""
    best = {device.best(ROWS, rate) for device in DEVICES.values() for rate in RATES}
    assert {1, MAX_DRAFT_TOKENS} < best and len(best) >= 6


def test_it_follows_the_acceptance() -> None:
    policy, device = AdaptiveDraftLength(), DEVICES["between"]
    for rate in (0.99, 0.1, 0.9):
        assert play(policy, device, rate, rounds=30)[-1] == device.best(ROWS, rate)


def test_it_follows_the_device() -> None:
    """Another model got slower: what was measured before is forgotten."""
    policy = AdaptiveDraftLength()
    for name in ("gpu_far", "cpu", "gpu_far"):
        chosen = play(policy, DEVICES[name], 0.9, rounds=300)
        assert chosen[-20:].count(DEVICES[name].best(ROWS, 0.9)) >= 18


def test_it_follows_the_number_of_rows() -> None:
    """On a device where tokens cost, few rows make long drafts worth it."""
    policy, device = AdaptiveDraftLength(), Device(line(1.0, 0), line(5.0, 0.01))
    sizes = (1000, 40)
    for _ in range(10):
        for num_rows in sizes:
            play(policy, device, 0.8, rounds=3, num_rows=num_rows)
    assert device.best(1000, 0.8) < device.best(40, 0.8)
    for num_rows in sizes:
        assert policy.choose(num_rows, FAR) == device.best(num_rows, 0.8)


@pytest.mark.parametrize("slow", ["student", "teacher", "both"])
def test_a_slow_first_round_is_got_over(slow: str) -> None:
    """Kernels are loaded, buffers allocated: a hundred times the usual."""
    policy, device = AdaptiveDraftLength(), DEVICES["between"]
    num_draft = policy.choose(ROWS, FAR)
    factors = {"student": (100, 1), "teacher": (1, 100), "both": (100, 100)}[slow]
    student, teacher = (
        factor * seconds
        for factor, seconds in zip(factors, device.seconds(ROWS, num_draft), strict=True)
    )
    policy.observe(RoundReport(ROWS, num_draft, student, teacher, ROWS, ROWS // 2))
    assert play(policy, device, 0.6, rounds=200)[-1] == device.best(ROWS, 0.6)


@pytest.mark.parametrize("remaining", [1, 2, 3, 5, 15])
def test_never_more_than_remain(remaining: int) -> None:
    policy, device = AdaptiveDraftLength(), DEVICES["gpu_far"]
    chosen = play(policy, device, 0.99, rounds=20, remaining=remaining)
    assert all(1 <= num_draft <= remaining for num_draft in chosen)
    assert chosen[-1] == device.best(ROWS, 0.99, most=remaining)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_never_more_than_the_maximum(most: int) -> None:
    policy, device = AdaptiveDraftLength(max_draft_tokens=most), DEVICES["gpu_far"]
    chosen = play(policy, device, 0.99, rounds=20)
    assert all(1 <= num_draft <= most for num_draft in chosen)
    assert chosen[-1] == most


def test_the_rate_is_a_fading_mean() -> None:
    policy = AdaptiveDraftLength()
    for _ in range(100):
        policy.observe(RoundReport(100, 4, 1.0, 1.0, num_verified=200, num_accepted=150))
    assert policy.acceptance_rate == pytest.approx(0.75, abs=1e-3)
    # Two thousand tokens later what came before counts half, i.e. about as much as they do.
    for _ in range(10):
        policy.observe(RoundReport(100, 4, 1.0, 1.0, num_verified=200, num_accepted=0))
    assert policy.acceptance_rate == pytest.approx(0.75 / 2, abs=0.02)
    for _ in range(100):
        policy.observe(RoundReport(100, 4, 1.0, 1.0, num_verified=200, num_accepted=0))
    assert policy.acceptance_rate < 1e-3
