"""The protocol: who is run when, and how speeds become speed-ups."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl_skd.draft_report import measure as room
from axolotl_skd.draft_report.counting import SpeculationCounts
from axolotl_skd.draft_report.decoding import Completion
from axolotl_skd.draft_report.measure import Measurement, measure
from tests.draft_report.pairs import decoding, pair


class Clock:
    """Stands in for `decode`: the teacher makes 10 tokens a second, a draft `rate` times as many."""

    def __init__(self, rates: dict[str, list[float]]) -> None:
        self.rates = rates  # per pass
        self.calls: list[tuple[str | None, int, int]] = []

    def __call__(
        self, _teacher: Any, student: str | None, prompt: list[int], _how: Any, seed: int
    ) -> Completion:
        self.calls.append((student, prompt[0], seed))
        passes = sum(call[:2] == (student, prompt[0]) for call in self.calls)
        number = passes - 1 - (prompt[0] == 1)  # the first prompt has had its turn untimed
        length = prompt[0] + (student == "odd" and prompt[0] == 2)
        rate = 1.0 if student is None else self.rates[student][max(number, 0)]
        counts = None if student is None else SpeculationCounts(5, 4, 3, 2, length)
        seconds = 1e9 if number < 0 else length / (10 * rate)
        return Completion(tuple(range(length)), seconds, counts)


def run(monkeypatch: pytest.MonkeyPatch, temperature: float) -> tuple[Clock, list[Measurement]]:
    clock = Clock({"even": [2.0, 4.0, 3.0], "odd": [0.5, 0.5, 0.5]})
    monkeypatch.setattr(room, "decode", clock)
    students = {"even": "even", "odd": "odd"}
    how = decoding(temperature)
    return clock, measure(None, students, [[1], [2]], how, repeats=3, seed=100)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speedups_are_of_tokens_per_second_pass_by_pass(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    _, (even, odd) = run(monkeypatch, temperature)
    assert even.speedups == pytest.approx((2.0, 4.0, 3.0))
    assert even.speedup == pytest.approx(3.0)
    assert even.tokens_per_second == pytest.approx(30.0)
    assert even.teacher_tokens_per_second == pytest.approx(10.0)
    assert odd.speedups == pytest.approx((0.5,) * 3)  # though its texts are longer
    assert even.counts == SpeculationCounts(30, 24, 18, 12, 9)  # of all passes, the untimed not
    if temperature:
        assert even.equal_outputs is None
    else:
        assert (even.equal_outputs, odd.equal_outputs) == (1.0, 0.5)


def test_contenders_take_turns_on_each_prompt_and_sampled_passes_draw_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, _ = run(monkeypatch, 1.0)
    names = (None, "even", "odd")
    assert [call[:2] for call in clock.calls[:3]] == [(name, 1) for name in names]
    timed = [(n, p, 100 + 2 * r + p - 1) for r in range(3) for p in (1, 2) for n in names]
    assert clock.calls[3:] == timed


def test_a_real_pair() -> None:
    teacher, student = pair()
    prompts = [[1, 2, 3], [4, 5]]
    (greedy,) = measure(teacher, {"before": student}, prompts, decoding(), repeats=2, seed=0)
    assert greedy.equal_outputs == 1
    assert greedy.counts.teacher_calls < greedy.counts.tokens
    assert len(greedy.speedups) == 2 and min(greedy.speedups) > 0
