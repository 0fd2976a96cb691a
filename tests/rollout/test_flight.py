"""Seats: who sits where and when, what is prefilled, what a round appends, how often the host waits.

The engine plays on hand-written models whose caches tell which row sits in which seat: the first
token of every prompt is its row's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_skd.rollout import engine as engine_module
from axolotl_skd.rollout import haste as haste_module
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.flight import Committed, Flight, Proposal, group_prompts
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.sampling import NonFiniteLogitsError, Role, keyed_uniform, row_streams
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source
from tests.rollout.scripted import (
    Script,
    ScriptedCache,
    ScriptedLM,
    batch,
    completions,
    count_up,
    params_of,
    skip_before_multiples_of_four,
    skip_one,
)
from tests.rollout.tiny import VOCAB_SIZE, one_thread, random_prompts, tiny_model

CPU = torch.device("cpu")
STOP, LENGTH = int(FinishReason.STOP), int(FinishReason.LENGTH)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


class WatchedLM(ScriptedLM):
    """Notes who sits in the seats at every forward, and every prompt that is prefilled."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.seated: list[list[int]] = []  # per decoding forward: first tokens, by seat
        self.prompts: list[tuple[int, list[int]]] = []  # seat, tokens with their padding

    def prefill(self, ids: Tensor, rows: Tensor, cache: ScriptedCache) -> None:
        super().prefill(ids, rows, cache)
        self.prompts += zip(rows.tolist(), ids.tolist(), strict=True)

    def forward(self, ids: Tensor, positions: Tensor, cache: ScriptedCache, longest: int) -> Tensor:
        hidden = super().forward(ids, positions, cache, longest)
        self.seated.append(cache.tokens[:, 0].tolist())
        return hidden


# What the number of seats may change.
ROUNDS = ("num_rounds", "num_proposed", "num_draft_steps")


def interleave(
    teacher: WatchedLM,
    prompts: list[list[int]],
    max_new: list[int],
    num_draft_tokens: int = 2,
    stop_ids: tuple[int, ...] = (),
    **options: Any,
) -> Rollout:
    engine = RolloutEngine(ScriptedLM(count_up), teacher, **options)
    return engine.interleave(batch(prompts, max_new), params_of(num_draft_tokens, 1, stop_ids))


# --- who sits where ---------------------------------------------------------------------------


def test_a_finished_row_gives_its_seat_to_the_next() -> None:
    """In order; and seats are given up only once nobody waits."""
    teacher = WatchedLM(count_up)
    result = interleave(
        teacher, [[10], [11], [12], [13], [14]], [2, 6, 2, 2, 4], rollout_batch_size=2
    )
    assert teacher.seated == [[10, 11], [12, 11], [13, 11], [14], [14]]
    assert result.num_rounds == 5
    assert completions(result) == [
        [11, 12],
        [12, 13, 14, 15, 16, 17],
        [13, 14],
        [14, 15],
        [15, 16, 17, 18],
    ]
    assert result.num_proposed.tolist() == [2, 6, 2, 2, 4]


def test_several_seats_are_filled_at_once() -> None:
    teacher = WatchedLM(count_up)
    interleave(
        teacher,
        [[10], [11], [12], [13], [14], [15]],
        [2, 4, 2, 2, 2, 2],
        rollout_batch_size=3,
    )
    assert teacher.seated == [[10, 11, 12], [13, 11, 14], [15]]


def test_one_seat_takes_the_rows_one_by_one() -> None:
    teacher = WatchedLM(skip_one)
    interleave(teacher, [[10], [11], [12]], [2, 1, 2], rollout_batch_size=1)
    assert teacher.seated == [[10], [10], [11], [12], [12]]


@pytest.mark.parametrize("size", [5, 6, 1000, None])
def test_more_seats_than_rows_are_not_made(size: int | None) -> None:
    teacher = WatchedLM(count_up)
    interleave(teacher, [[10 + i] for i in range(5)], [2] * 5, rollout_batch_size=size)
    assert teacher.seated == [[10, 11, 12, 13, 14]]


def test_a_stop_in_the_first_token_frees_the_seat_at_once() -> None:
    """Rows 1 and 3 end with their first token; row 4 does in a seat that was freed so."""
    teacher = WatchedLM(count_up)
    result = interleave(
        teacher,
        [[30], [19], [40, 31], [1, 2, 19], [19]],
        [4, 9, 2, 9, 9],
        stop_ids=(20,),
        rollout_batch_size=2,
    )
    assert teacher.seated == [[30, 19], [30, 40], [1, 19]]
    assert completions(result) == [[31, 32, 33, 34], [20], [32, 33], [20], [20]]
    assert result.finish_reasons.tolist() == [LENGTH, STOP, LENGTH, STOP, STOP]
    assert result.num_proposed.tolist() == [4, 2, 2, 2, 2]
    assert result.completion_lengths.tolist() == [4, 1, 2, 1, 1]


def test_sampling_from_one_model_is_seated_too() -> None:
    student = WatchedLM(count_up)
    engine = RolloutEngine(student, rollout_batch_size=2)
    prompts = batch([[10], [11], [12, 7]], [1, 3, 2])
    assert completions(engine.sample_student(prompts, params_of(5))) == [
        [11],
        [12, 13, 14],
        [8, 9],
    ]
    assert student.seated == [[10, 11], [12, 11], [12, 11]]
    assert student.prompts == [(0, [12])]


# --- what a seat may not change ---------------------------------------------------------------

# Of all lengths, with rows of one token and of one new token.
PROMPTS = [[1], [2, 5, 30], [3, 2], [4, 8, 8, 40], [5], [6, 47, 48, 3, 20], [7, 7]]
MAX_NEW = [7, 3, 1, 9, 5, 8, 1]


def tempered(prefix: list[int]) -> list[int]:
    """The first prompt token says how strict the teacher is."""
    return (count_up, skip_one, skip_before_multiples_of_four)[prefix[0] % 3](prefix)


def assert_equal(got: Rollout, expected: Rollout, but: tuple[str, ...] = ()) -> None:
    for field in fields(Rollout):
        if field.name not in but:
            a, b = getattr(got, field.name), getattr(expected, field.name)
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 20])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
def test_seats_change_nothing(num_draft_tokens: int, size: int, fixed_shapes: bool) -> None:
    """Only when a row is played, and so how much of a round is in vain at its end."""
    options = {"num_draft_tokens": num_draft_tokens, "stop_ids": (9, 33)}
    expected = interleave(WatchedLM(tempered), PROMPTS, MAX_NEW, **options)
    got = interleave(
        WatchedLM(tempered),
        PROMPTS,
        MAX_NEW,
        rollout_batch_size=size,
        fixed_shapes=fixed_shapes,
        **options,
    )
    assert_equal(got, expected, but=ROUNDS)
    assert (got.num_proposed >= got.completion_lengths).all() or num_draft_tokens > 1


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_empty_seats_do_not_count(num_draft_tokens: int, num_rows: int) -> None:
    """Powers of two alone, never growing; every number as without."""
    rows = slice(num_rows)
    teachers = WatchedLM(tempered), WatchedLM(tempered)
    free, fixed = (
        interleave(
            teacher,
            PROMPTS[rows],
            MAX_NEW[rows],
            num_draft_tokens,
            stop_ids=(9, 33),
            fixed_shapes=option,
        )
        for teacher, option in zip(teachers, (False, True), strict=True)
    )
    assert_equal(fixed, free)
    sizes = [len(seats) for seats in teachers[1].seated]
    assert sizes == sorted(sizes, reverse=True)
    live = [len(seats) for seats in teachers[0].seated]
    assert sizes == [next(n for n in (1, 2, 4, 8) if n >= count) for count in live]
    # Whoever is in flight has a seat.
    for some, all_seats in zip(teachers[0].seated, teachers[1].seated, strict=True):
        assert set(some) <= set(all_seats)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_fixed_shapes_do_not_exceed_the_rows_asked_for(size: int) -> None:
    """`rollout_batch_size` bounds the memory of the caches."""
    teacher = WatchedLM(tempered)
    interleave(teacher, PROMPTS, MAX_NEW, rollout_batch_size=size, fixed_shapes=True)
    sizes = [len(seats) for seats in teacher.seated]
    assert sizes[0] == max(sizes) == size
    assert set(sizes) <= {size, 1, 2, 4}


# --- prefill ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_every_prompt_is_prefilled_once_into_its_seat(size: int | None) -> None:
    """All of it but the pending last token; both models alike."""
    student, teacher = WatchedLM(count_up), WatchedLM(tempered)
    engine = RolloutEngine(student, teacher, rollout_batch_size=size)
    engine.interleave(batch(PROMPTS, MAX_NEW), params_of(2))
    assert student.prompts == teacher.prompts
    got = {tuple(ids): seat for seat, ids in teacher.prompts}
    long = [prompt[:-1] for prompt in PROMPTS if len(prompt) > 1]
    assert len(teacher.prompts) == len(long)
    for prompt in long:
        (seat,) = (
            seat
            for ids, seat in got.items()
            if list(ids[: len(prompt)]) == prompt and not any(ids[len(prompt) :])
        )
        # There it sits in the forwards to come, until it ends.
        assert any(seat < len(seats) and seats[seat] == prompt[0] for seats in teacher.seated)


def test_large_batches_are_prefilled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here at most 6 tokens at once, padding included."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 6)
    teacher = WatchedLM(tempered)
    expected = interleave(WatchedLM(tempered), PROMPTS, MAX_NEW, rollout_batch_size=4)
    assert_equal(
        interleave(teacher, PROMPTS, MAX_NEW),
        expected,
        but=ROUNDS,
    )
    # Prompts of 4, 3, 2, 1, 1 tokens without their last: 4 | 3 + 3 padded | 1 + 1.
    assert teacher.prefilled == [[5], [3, 1], [2, 6]]


LENGTHS = [
    [1, 1, 1],
    [5],
    [2, 2, 2, 2, 2, 2],
    [100, 1, 3, 3, 50, 49, 2, 1, 7],
    [9, 10, 11, 12, 13, 14, 15, 16, 17],
]


@pytest.mark.parametrize("most", [1, 4, 16, 60, 10_000])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_groups_of_prompts(lengths: list[int], most: int) -> None:
    admitted = [(seat, torch.arange(length)) for seat, length in enumerate(lengths)]
    groups = group_prompts(admitted, most)
    members = [entry for group in groups for entry in group]
    assert sorted(seat for seat, _ in members) == [i for i, n in enumerate(lengths) if n > 1]
    assert all(len(ids) == lengths[seat] for seat, ids in members)

    def padded(group: list[tuple[int, Tensor]]) -> int:
        return len(group) * (max(len(ids) for _, ids in group) - 1)

    assert all(group and (padded(group) <= most or len(group) == 1) for group in groups)
    # Similar lengths together, and no more groups than the bound asks for.
    for group, following in zip(groups, groups[1:], strict=False):
        assert min(len(ids) for _, ids in group) >= max(len(ids) for _, ids in following)
        assert padded([*group, following[0]]) > most


# --- a round ----------------------------------------------------------------------------------


def flight_of(lengths: list[int], max_new: list[int], **options: Any) -> Flight:
    """Prompts of tokens 100, 101, ...; stop token 7."""
    prompts = Prompts(
        tuple(100 + torch.arange(length) for length in lengths),
        row_streams(0, 0, torch.arange(len(lengths))),
        torch.tensor(max_new),
    )
    return Flight(prompts, (7,), CPU, **options)


def proposal(
    tokens: list[list[int]],
    limit: list[int],
    num_accepted: list[int] | None = None,
    settled: bool = True,
) -> Proposal:
    ids = torch.tensor(tokens)
    return Proposal(
        tokens=ids,
        limit=torch.tensor(limit),
        num_accepted=torch.tensor(limit if num_accepted is None else num_accepted),
        proposed_ids=ids + 1000,
        hidden=ids[:, :, None].float(),
        settled=torch.tensor(settled),
    )


def play(flight: Flight, *args: Any, **kwargs: Any) -> Committed | None:
    return flight.commit(flight.judge(proposal(*args, **kwargs)))


def test_what_a_round_appends() -> None:
    """A row at its length, one that stops, one that goes on; tokens beyond are nothing."""
    flight = flight_of([1, 2, 3], [2, 9, 9])
    assert [(seat, len(ids)) for seat, ids in flight.admit()] == [(0, 1), (1, 2), (2, 3)]
    assert flight.pending.tolist() == [100, 101, 102]
    assert (flight.num_live, flight.longest, flight.longest_remaining) == (3, 3, 9)
    committed = play(
        flight, [[1, 2, 3, 4], [5, 7, 7, 6], [8, 9, 10, 7]], [4, 4, 3], num_accepted=[4, 4, 2]
    )
    assert committed == Committed(num_tokens=2 + 2 + 3, num_accepted=2 + 2 + 2)
    assert flight.num_live == 1
    assert flight.pending.tolist()[2] == 10
    assert (flight.longest, flight.longest_remaining) == (6, 6)
    assert flight.rows_at([0, 1, 2]) == [2]
    result = flight.rollout(Source.INTERLEAVED)
    assert result.completion_ids.tolist() == [[1, 2, 0], [5, 7, 0], [8, 9, 10]]
    assert result.completion_mask.sum(1).tolist() == [2, 2, 3]
    assert result.accepted_mask.tolist() == [
        [True, True, False],
        [True, True, False],
        [True, True, False],
    ]
    assert result.proposed_ids.tolist() == [[1001, 1002, -1], [1005, 1007, -1], [1008, 1009, 1010]]
    assert result.teacher_hidden[..., 0].tolist() == [[1, 2, 0], [5, 7, 0], [8, 9, 10]]
    assert result.finish_reasons.tolist() == [LENGTH, STOP, LENGTH]
    assert (result.num_rounds, result.num_proposed.tolist()) == (1, [4, 4, 4])


def test_an_unsettled_proposal_changes_nothing() -> None:
    """The round that is done again appends what it would have at once."""
    flights = [flight_of([1, 2], [4, 4]) for _ in range(2)]
    for flight in flights:
        flight.admit()
    assert play(flights[0], [[7, 8], [9, 7]], [2, 2], settled=False) is None
    assert (flights[0].num_live, flights[0].pending.tolist()) == (2, [100, 101])
    assert flights[0].positions(1).tolist() == [[0], [1]]
    for flight in flights:
        assert play(flight, [[1, 2], [3, 4]], [2, 1]) == Committed(3, 3)
        assert play(flight, [[5, 7], [7, 6]], [2, 2]) == Committed(3, 3)
    results = [flight.rollout(Source.INTERLEAVED) for flight in flights]
    assert_equal(*results)
    assert results[0].num_rounds == 2


def test_positions_and_random_numbers_are_those_of_the_row() -> None:
    flight = flight_of([4, 2, 1], [3, 9, 9], num_seats=2)
    flight.admit()
    # From the pending token on; clamped to the last position of the row.
    assert flight.positions(5).tolist() == [[3, 4, 5, 6, 6], [1, 2, 3, 4, 5]]
    play(flight, [[1, 7], [2, 3]], [2, 2])
    assert [(seat, ids.tolist()) for seat, ids in flight.admit()] == [(0, [100])]
    assert flight.positions(2).tolist() == [[0, 1], [3, 4]]
    streams = row_streams(0, 0, torch.arange(3))
    got = flight.uniforms(3)
    assert got.shape == (3, 2, 3) and got.dtype == torch.float64
    for role in (Role.STUDENT, Role.TEACHER, Role.ACCEPT):
        for seat, (row, first) in enumerate([(2, 1), (1, 4)]):
            expected = keyed_uniform(streams[row], torch.arange(first, first + 3), role)
            assert torch.equal(got[role, seat], expected)


def test_compaction_keeps_the_living() -> None:
    flight = flight_of([1, 2, 3, 4, 5], [1, 9, 1, 9, 9])
    flight.admit()
    assert flight.compact() is None  # all live
    play(flight, [[1], [2], [3], [4], [5]], [1] * 5)
    assert flight.compact().tolist() == [1, 3, 4]
    assert flight.compact() is None
    assert (flight.num_seats, flight.num_live) == (3, 3)
    assert flight.pending.tolist() == [2, 4, 5]
    assert flight.positions(1).tolist() == [[2], [4], [5]]
    assert flight.rows_at([0, 1, 2]) == [1, 3, 4]
    play(flight, [[6], [7], [8]], [1] * 3)
    assert flight.compact().tolist() == [0, 2]
    result = flight.rollout(Source.STUDENT)
    assert completions(result) == [[1], [2, 6], [3], [4, 7], [5, 8]]


def test_compaction_to_sizes_that_are_allowed() -> None:
    """5 rows in 8 seats; 3 remain, which need 4; an empty seat does no harm."""
    flight = flight_of([1, 2, 3, 4, 5], [1, 9, 1, 9, 9], seats_for=lambda n: {5: 8, 3: 4}[n])
    assert flight.num_seats == 8
    flight.admit()
    assert flight.rows_at(range(8)) == [0, 1, 2, 3, 4]
    assert flight.positions(3).shape == (8, 3)
    play(flight, [[i, i + 10] for i in range(8)], [1] * 8)
    kept = flight.compact().tolist()
    assert kept[:3] == [1, 3, 4] and len(set(kept)) == 4
    assert (flight.num_seats, flight.num_live) == (4, 3)
    play(flight, [[20], [21], [22], [23]], [1] * 4)
    result = flight.rollout(Source.STUDENT)
    assert completions(result) == [[0], [1, 20], [2], [3, 21], [4, 22]]
    assert result.num_proposed.tolist() == [2, 3, 2, 3, 3]


# --- how often the host waits -----------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its device: reading results, and copying lists to it."""

    _READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.num_reads = self.num_writes = 0
        tolist = torch.Tensor.tolist

        def counted_tolist(values: Tensor) -> Any:
            self.num_reads += 1
            return tolist(values)

        def counted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(data: Any, *args: Any, **kwargs: Any) -> Tensor:
                self.num_writes += not torch.is_tensor(data)
                return make(data, *args, **kwargs)

            return call

        monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
        for name in ("tensor", "as_tensor"):
            monkeypatch.setattr(torch, name, counted(getattr(torch, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.num_reads += name in self._READING or name.startswith("unique") or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["interleave", "sample_student", "sample_teacher"])
def test_the_host_waits_once_a_round(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollouts alike but for the number of rounds: no row ends before the last."""
    models = [CausalLM(tiny_model("llama", seed=seed, sharpness=20.0)) for seed in (1, 2)]
    params = SamplingParams(3, VOCAB_SIZE, 0.5, 0.5, 0.5, 0.5, stop_token_ids=())

    def waits(max_new: int, patient: bool) -> tuple[int, int, int]:
        prompts = Prompts(
            tuple(map(torch.tensor, random_prompts(5, [1, 9, 7]))),
            row_streams(3, 1, torch.arange(3)),
            torch.full((3,), max_new),
        )
        engine = RolloutEngine(*models, patient=patient)
        with monkeypatch.context() as patch, Waits(patch) as counted:
            result = getattr(engine, method)(prompts, params)
        return result.num_rounds, counted.num_reads, counted.num_writes

    def difference(patient: bool) -> list[int]:
        few, many = waits(3, patient), waits(12, patient)
        return [b - a for a, b in zip(few, many, strict=True)]

    rounds, reads, writes = difference(patient=False)
    assert rounds == (3 if method == "interleave" else 9)
    assert (reads, writes) == (rounds, 0)
    assert difference(patient=True)[1] > rounds  # the count sees what it should


# --- haste ------------------------------------------------------------------------------------


def hasty_rounds(
    monkeypatch: pytest.MonkeyPatch, enough: Callable[[int], bool], num_rounds: int
) -> tuple[list[int], Rollout]:
    """Rounds that are tried in haste, where the shortlist is long `enough` or not; and what came.

    A token a round, counting up; an attempt that was not enough has it wrong.
    """
    tried: list[int] = []
    student = ScriptedLM(count_up)
    sample = haste_module.sample_from_shortlist

    def in_haste(*args: Any) -> tuple[Tensor, Tensor]:
        tokens, _ = sample(*args)
        number = student.fed[-1][0][0]  # a prompt of one token: its round is its position
        tried.append(number)
        good = enough(number)
        return (tokens if good else tokens + 1), torch.full_like(tokens, good, dtype=torch.bool)

    monkeypatch.setattr(haste_module, "sample_from_shortlist", in_haste)
    engine = RolloutEngine(student, patient=False)
    result = engine.sample_student(batch([[0]], [num_rounds]), params_of(1))
    assert completions(result) == [[(i + 1) % 50 for i in range(num_rounds)]]
    assert result.num_rounds == num_rounds
    return tried, result


def test_haste_that_is_enough_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, _ = hasty_rounds(monkeypatch, lambda _: True, 20)
    assert tried == list(range(20))


def test_haste_in_vain_is_tried_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pauses of 1, 2, 4, ... 64, 64 rounds, so what is lost is bounded; all tokens are right."""
    tried, _ = hasty_rounds(monkeypatch, lambda _: False, 250)
    pauses = [b - a - 1 for a, b in zip(tried, tried[1:], strict=False)]
    assert (tried[0], pauses) == (0, [1, 2, 4, 8, 16, 32, 64, 64])


def test_haste_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One success and it is trusted again; the next failure costs one round's pause."""
    tried, _ = hasty_rounds(monkeypatch, lambda number: number > 4 and number != 15, 20)
    assert tried == [0, 2, *range(5, 16), 17, 18, 19]


def test_an_empty_seat_does_not_spoil_the_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples are nobody's: three rows in four seats, then one row in one."""
    calls = []
    sample = haste_module.sample_from_shortlist

    def in_haste(*args: Any) -> tuple[Tensor, Tensor]:
        tokens, settled = sample(*args)
        calls.append(len(tokens))
        return tokens, settled & (torch.arange(len(tokens)) < 3)

    monkeypatch.setattr(haste_module, "sample_from_shortlist", in_haste)
    engine = RolloutEngine(ScriptedLM(count_up), patient=False, fixed_shapes=True)
    result = engine.sample_student(batch([[1], [2], [3]], [4, 6, 4]), params_of(1))
    assert completions(result) == [[2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [4, 5, 6, 7]]
    assert calls == [4, 4, 4, 4, 1, 1]


# --- logits from which nothing can be sampled -------------------------------------------------


class BrokenLM(WatchedLM):
    """Not a number wherever the first token of the prompt is 13."""

    def _logits(self, prefix: Tensor) -> Tensor:
        logits = super()._logits(prefix)
        return logits * torch.nan if int(prefix[0]) == 13 else logits


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_an_error_names_the_row_not_its_seat(broken: str, patient: bool) -> None:
    """Row 3 sits in seat 0 by then."""
    kinds = [BrokenLM if name == broken else WatchedLM for name in ("student", "teacher")]
    engine = RolloutEngine(
        *(kind(skip_one) for kind in kinds), rollout_batch_size=2, patient=patient
    )
    with pytest.raises(NonFiniteLogitsError) as error:
        engine.interleave(batch([[10], [11], [12], [13]], [2, 6, 2, 2]), params_of(2))
    assert error.value.rows == [3]
