"""Random numbers, nucleus sampling and the acceptance test agree with their definitions.

Proves: the keyed random numbers are the documented hash bit for bit and look uniform and
independent; `sample_top_p` is inverse-CDF sampling from the exact nucleus whatever the shortlist
does; acceptance is the rank among raw logits, ties included. References are the loops of `oracle`.

Statistical tests bound deviations by concentration inequalities that hold for every sample size, so
the chance that a perfect generator fails is at most `FALSE_ALARM` per test. Seeds are fixed.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from axolotl_skd.rollout.sampling import (
    SHORTLIST,
    NonFiniteLogitsError,
    Role,
    keyed_uniform,
    row_streams,
    sample_top_p,
    top_k_accept_mask,
)
from tests.rollout import oracle
from tests.rollout.oracle import Key, Sampler

FALSE_ALARM = 1e-9
INT64_EXTREMES = (0, 1, -1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), -(2**63) + 1)
LAST_UNIFORM = 1 - 2.0**-53


def hoeffding(num_samples: int, spread: float, num_claims: int = 1) -> float:
    """t such that P(one of the means is off by more than t) <= FALSE_ALARM, for every sample size.

    Args:
        num_samples: independent values per mean.
        spread: length of the interval in which the values lie.
        num_claims: means that are looked at (union bound).
    """
    return spread * math.sqrt(math.log(2 * num_claims / FALSE_ALARM) / (2 * num_samples))


# --- keyed_uniform ----------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.STUDENT, Role.TEACHER])
@pytest.mark.parametrize("position", [0, 1, 4095, 2**63 - 1, -1])
def test_uniforms_equal_python_integers(position: int, role: Role) -> None:
    for seed, epoch, rollout_index in [(0, 0, 0), (42, 3, 1), (-7, 0, 2), (2**63 - 1, 2**40, -5)]:
        streams = row_streams(seed, epoch, torch.tensor(INT64_EXTREMES), rollout_index)
        got = keyed_uniform(streams, torch.tensor(position), role)
        keys = [Key(seed, epoch, sample, rollout_index) for sample in INT64_EXTREMES]
        # Bit for bit: both are integers times 2^-53.
        assert got.tolist() == [oracle.uniform(key, position, role) for key in keys]


def test_uniforms_of_random_keys_equal_python_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator)
    positions = torch.randint(0, 2**20, (500,), generator=generator)
    got = keyed_uniform(row_streams(9, 2, samples), positions, Role.TEACHER).tolist()
    pairs = zip(samples.tolist(), positions.tolist(), strict=True)
    assert got == [oracle.uniform(Key(9, 2, sample), position, 1) for sample, position in pairs]


def test_roles_have_the_documented_numbers() -> None:
    assert (int(Role.STUDENT), int(Role.TEACHER)) == (oracle.STUDENT, oracle.TEACHER)


def test_uniforms_broadcast_and_lie_in_range() -> None:
    streams = row_streams(1, 0, torch.arange(100))
    uniforms = keyed_uniform(streams[:, None], torch.arange(1000), Role.STUDENT)
    assert uniforms.shape == (100, 1000) and uniforms.dtype == torch.float64
    assert float(uniforms.min()) >= 0 and float(uniforms.max()) < 1
    assert uniforms[7, 123] == keyed_uniform(streams[7], torch.tensor(123), Role.STUDENT)
    multiples = uniforms * 2.0**53
    assert torch.equal(multiples, multiples.round())


def test_the_largest_uniform_is_below_one() -> None:
    """All 53 bits set: conversion to float must not round up to 1."""
    assert oracle.absorb([]) == 0 and (2**64 - 1 >> 11) / 2**53 == LAST_UNIFORM < 1


def uniform_grid() -> Tensor:
    """[role, sample, position] = [2, 300, 500]"""
    streams = row_streams(5, 1, torch.arange(300))[:, None]
    return torch.stack([keyed_uniform(streams, torch.arange(500), role) for role in Role])


def test_uniforms_are_uniform() -> None:
    """Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > t) <= 2 exp(-2 n t^2)."""
    values = uniform_grid().flatten().sort().values
    n = len(values)
    ranks = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((values - ranks / n).abs(), (values - (ranks + 1) / n).abs()).max()
    assert float(distance) <= hoeffding(n, 1.0)


@pytest.mark.parametrize("low_bits", [1, 2, 8])
def test_low_bits_are_uniform(low_bits: int) -> None:
    """The bits that the distribution function cannot see."""
    integers = (uniform_grid().flatten() * 2.0**53).long()
    frequencies = torch.bincount(integers % 2**low_bits) / len(integers)
    bound = hoeffding(len(integers), 1.0, num_claims=2**low_bits)
    assert float((frequencies - 2.0**-low_bits).abs().max()) <= bound


def neighbours(axis: str) -> tuple[Tensor, Tensor]:
    """Disjoint pairs of numbers whose keys differ in one component, by 1."""
    grid = uniform_grid()
    if axis == "role":
        return grid[0].flatten(), grid[1].flatten()
    if axis == "sample":
        return grid[:, 0::2].flatten(), grid[:, 1::2].flatten()
    if axis == "position":
        return grid[:, :, 0::2].flatten(), grid[:, :, 1::2].flatten()
    keys = {
        "seed": ((0, 1, 0), (1, 1, 0)),
        "epoch": ((0, 1, 0), (0, 2, 0)),
        "rollout": ((0, 1, 0), (0, 1, 1)),
    }
    samples, positions = torch.arange(300)[:, None], torch.arange(500)
    first, second = (
        keyed_uniform(row_streams(seed, epoch, samples, index), positions, Role.STUDENT)
        for seed, epoch, index in keys[axis]
    )
    return first.flatten(), second.flatten()


@pytest.mark.parametrize("axis", ["role", "sample", "position", "seed", "epoch", "rollout"])
def test_neighbouring_keys_give_independent_numbers(axis: str) -> None:
    """Every cell of a 8 x 8 grid is hit with probability 1/64 by (u, v) if u, v are independent."""
    u, v = neighbours(axis)
    cells = (u * 8).long() * 8 + (v * 8).long()
    frequencies = torch.bincount(cells, minlength=64) / len(cells)
    assert float((frequencies - 1 / 64).abs().max()) <= hoeffding(len(cells), 1.0, num_claims=64)
    # The covariance sees what is finer than the cells; (u - 1/2)(v - 1/2) spreads over 1/2.
    covariance = ((u - 0.5) * (v - 0.5)).mean()
    assert abs(float(covariance)) <= hoeffding(len(u), 0.5)


def test_every_component_of_the_key_matters() -> None:
    samples = torch.arange(-50, 50)
    base = row_streams(1, 2, samples, 3)
    others = [
        row_streams(2, 2, samples, 3),
        row_streams(1, 3, samples, 3),
        row_streams(1, 2, samples, 4),
        row_streams(2, 1, samples, 3),  # swapped: the hash depends on the order
        row_streams(3, 2, samples, 1),
    ]
    streams = torch.cat([base, *others])
    assert len(streams.unique()) == len(streams)


def test_streams_do_not_depend_on_the_batch() -> None:
    samples = torch.tensor([5, -9, 2**62, 5])
    together = row_streams(1, 0, samples)
    assert together[0] == together[3]
    for i in range(4):
        assert row_streams(1, 0, samples[i : i + 1])[0] == together[i]


# --- sample_top_p -----------------------------------------------------------------------------


def draws_of_oracle(logits: Tensor, sampler: Sampler, uniforms: Tensor) -> list[int]:
    rows = zip(logits.double().tolist(), uniforms.tolist(), strict=True)
    return [oracle.draw(row, sampler, u) for row, u in rows]


def random_uniforms(count: int, seed: int) -> Tensor:
    """Random numbers with both ends of the range among them.

    The upper end is 1e-9 short of 1: which of the tokens of mass 1e-15 ends a long tail is a matter
    of the rounding of float64 sums (1e-16 per token, thousands of tokens).
    """
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    uniforms[:2] = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)
    return uniforms


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("vocab_size", "count"), [(5, 60), (130, 40), (1000, 16), (5000, 5)])
def test_draws_equal_the_full_sort(
    vocab_size: int, count: int, top_p: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    # From flat (the nucleus is wider than the shortlist) to peaked (one token is everything).
    spread = torch.logspace(-1, 1, count)[:, None]
    logits = torch.randn(count, vocab_size, generator=generator) * spread
    uniforms = random_uniforms(count, seed=int(1000 * temperature))
    got = sample_top_p(logits, temperature, top_p, uniforms)
    assert got.dtype == torch.int64
    assert got.tolist() == draws_of_oracle(logits, Sampler(temperature, top_p), uniforms)


@pytest.mark.parametrize("top_p", [0.1337, 0.5337, 0.9337, 1.0])
@pytest.mark.parametrize("shortlist", [1, 2, 7, 64, 300, 10_000])
def test_the_shortlist_never_changes_the_draw(shortlist: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator) * torch.logspace(-2, 1, 40)[:, None]
    uniforms = random_uniforms(40, seed=2)
    got = sample_top_p(logits, 0.7, top_p, uniforms, shortlist=shortlist)
    assert got.tolist() == draws_of_oracle(logits, Sampler(0.7, top_p), uniforms)


@pytest.mark.parametrize("num_levels", [1, 2, 5])
@pytest.mark.parametrize("shortlist", [1, 8, 50, SHORTLIST])
# Masses that no whole number of tied tokens has: at an exact hit, rounding would decide.
@pytest.mark.parametrize("top_p", [1e-6, 0.3337, 0.8337, 1.0])
def test_exact_ties_go_to_the_lower_id(num_levels: int, shortlist: int, top_p: float) -> None:
    """Few distinct logits: ties everywhere, at the shortlist's edge too."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(num_levels, (60, 400), generator=generator).float()
    uniforms = random_uniforms(60, seed=4)
    got = sample_top_p(logits, 1.0, top_p, uniforms, shortlist=shortlist)
    assert got.tolist() == draws_of_oracle(logits, Sampler(1.0, top_p), uniforms)


def test_ties_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0]])

    def draw(u: float, top_p: float) -> int:
        return int(sample_top_p(logits, 1.0, top_p, torch.tensor([u], dtype=torch.float64)))

    # Order 1, 3, 0, 2, 4 with weights e^2, e^2, e, e, 1: running sums .349 .698 .826 .955 1.
    e = math.e
    sums = [s / (2 * e**2 + 2 * e + 1) for s in (e**2, 2 * e**2, 2 * e**2 + e, 2 * e**2 + 2 * e)]
    assert [draw(u, 1.0) for u in (0.0, *(s + 1e-9 for s in sums))] == [1, 3, 0, 2, 4]
    assert [draw(s - 1e-9, 1.0) for s in sums] == [1, 3, 0, 2]
    # A nucleus of mass >= .3 is the lower id alone, of mass >= .4 both.
    assert [draw(u, 0.3) for u in (0.0, LAST_UNIFORM)] == [1, 1]
    assert [draw(u, 0.4) for u in (0.0, 0.499, 0.501, LAST_UNIFORM)] == [1, 1, 3, 3]


def test_the_crossing_token_belongs_to_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(2, -1)
    uniforms = torch.tensor([0.0, LAST_UNIFORM], dtype=torch.float64)
    for top_p, last in [(0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (1.0, 2)]:
        assert sample_top_p(logits, 1.0, top_p, uniforms).tolist() == [0, last]


@pytest.mark.parametrize("vocab_size", [5, 300, 1000])
@pytest.mark.parametrize("top_p", [0.5337, 0.999, 1.0])
@pytest.mark.parametrize("num_finite", [1, 3])
def test_minus_infinity_is_never_sampled(vocab_size: int, top_p: float, num_finite: int) -> None:
    logits = torch.full((50, vocab_size), -torch.inf)
    finite = torch.arange(num_finite) * (vocab_size // num_finite) + 1
    logits[:, finite] = torch.randn(50, num_finite, generator=torch.Generator().manual_seed(5))
    uniforms = random_uniforms(50, seed=6)
    uniforms[1] = LAST_UNIFORM
    got = sample_top_p(logits, 1.0, top_p, uniforms)
    assert torch.isin(got, finite).all()
    assert got.tolist() == draws_of_oracle(logits, Sampler(1.0, top_p), uniforms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("top_p", [0.5337, 1.0])
def test_low_precision_logits_are_sampled_in_double(dtype: torch.dtype, top_p: float) -> None:
    """bf16 logits of a real size tie often; division by 0.7 in bf16 would make more ties."""
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(40, 1000, generator=generator) * 4).to(dtype)
    uniforms = random_uniforms(40, seed=8)
    got = sample_top_p(logits, 0.7, top_p, uniforms)
    assert got.tolist() == draws_of_oracle(logits, Sampler(0.7, top_p), uniforms)


def test_draws_do_not_depend_on_the_batch() -> None:
    """A flat row widens the shortlist of all; the others' tokens must not notice."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(12, 2000, generator=generator) * torch.logspace(-2, 1, 12)[:, None]
    uniforms = random_uniforms(12, seed=10)
    together = sample_top_p(logits, 1.0, 0.9, uniforms)
    alone = [
        sample_top_p(logits[i : i + 1], 1.0, 0.9, uniforms[i : i + 1]).item() for i in range(12)
    ]
    assert together.tolist() == alone


def test_the_input_is_left_alone() -> None:
    logits = torch.randn(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    before = logits.clone()
    sample_top_p(logits, 0.5, 0.5, random_uniforms(3, seed=12))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.8), (2.0, 0.999)])
def test_frequencies_match_the_distribution(temperature: float, top_p: float) -> None:
    """Keyed uniforms in, nucleus out: every token's share lies within Hoeffding's bound."""
    count = 200_000
    probs = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.07, 0.03], dtype=torch.float64)
    tempered = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum()
    inside = tempered.cumsum(0) - tempered < top_p
    expected = tempered * inside / tempered[inside].sum()
    uniforms = keyed_uniform(row_streams(3, 0, torch.arange(count)), torch.tensor(9), Role.STUDENT)
    draws = sample_top_p(probs.log().expand(count, -1), temperature, top_p, uniforms)
    shares = torch.bincount(draws, minlength=6) / count
    assert float((shares - expected).abs().max()) <= hoeffding(count, 1.0, num_claims=6)
    assert shares[~inside].sum() == 0


# --- top_k_accept_mask ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 25, 199, 200, 1000])
def test_acceptance_equals_the_sort(top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(13)
    logits = torch.randn(4, 7, 200, generator=generator).to(dtype)
    logits[0] = torch.randint(5, (7, 200), generator=generator).to(dtype)  # ties everywhere
    tokens = torch.randint(200, (4, 7), generator=generator)
    got = top_k_accept_mask(logits, tokens, top_k)
    assert got.dtype == torch.bool and got.shape == (4, 7)
    expected = [
        [oracle.in_top_k(logits[b, g].tolist(), int(tokens[b, g]), top_k) for g in range(7)]
        for b in range(4)
    ]
    assert got.tolist() == expected


def test_acceptance_by_hand() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]).expand(5, -1)
    tokens = torch.arange(5)

    def accepted(top_k: int) -> list[int]:
        return top_k_accept_mask(logits, tokens, top_k).nonzero()[:, 0].tolist()

    assert accepted(1) == [0]
    assert accepted(2) == [0, 2, 3]  # ids 2 and 3 tie at rank 2: both pass
    assert accepted(3) == [0, 2, 3]
    assert accepted(4) == [0, 1, 2, 3]
    assert accepted(5) == accepted(9) == [0, 1, 2, 3, 4]


def test_the_whole_vocabulary_is_accepted_when_k_is_v() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(14))
    logits[:10] = -torch.inf
    assert top_k_accept_mask(logits.expand(50, -1), torch.arange(50), 50).all()


@pytest.mark.parametrize("temperature", [0.2, 1.7])
def test_scaling_the_logits_keeps_the_verdicts(temperature: float) -> None:
    """Only the order counts. Distinct float64 logits stay distinct under division."""
    logits = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(15))
    logits, tokens = logits.expand(300, -1), torch.arange(300)
    raw = top_k_accept_mask(logits, tokens, 25)
    assert int(raw.sum()) == 25
    assert torch.equal(raw, top_k_accept_mask(logits / temperature, tokens, 25))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab_size", [5, 1000])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_nothing_is_sampled_from_broken_logits(bad: float, vocab_size: int, top_p: float) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, 2] = bad
    with pytest.raises(NonFiniteLogitsError, match="logits of rows 1 are not finite"):
        sample_top_p(logits, 1.0, top_p, torch.full((3,), 0.5, dtype=torch.float64))


def test_nothing_is_sampled_where_everything_is_impossible() -> None:
    logits = torch.full((1, 300), -torch.inf)
    with pytest.raises(NonFiniteLogitsError):
        sample_top_p(logits, 1.0, 1.0, torch.zeros(1, dtype=torch.float64))
