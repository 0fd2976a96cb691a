"""Acceptance rules, replacements, bonus tokens: by hand, by the oracle, and by counting samples.

Proves: every rule keeps what its definition keeps; the engine under it equals the naive uncached loop
token by token, whatever the draft length and batch; and the ratio test commits tokens that are
distributed as samples of the teacher.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axolotl_skd.rollout.acceptance import (
    ACCEPTANCE_RULES,
    RatioTest,
    accept_min_p,
    accept_top_p,
    teacher_replacement,
)
from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.sampling import row_streams, sample_top_p, warped_probs
from axolotl_skd.rollout.types import AUTO, FinishReason, Prompts, Rollout, SamplingParams
from tests.rollout import oracle
from tests.rollout.oracle import Key, OracleRow, Sampler
from tests.rollout.tiny import STOP_IDS, closeness, one_thread, random_prompts, tiny_model

SEED, EPOCH, FIRST_SAMPLE = 3, 1, 100
PROMPT_LENGTHS = [1, 40, 7, 2, 23, 33, 12, 17]
MAX_NEW = [24, 24, 5, 24, 1, 17, 24, 24]
PARAMS = SamplingParams(5, 40, 0.9, 0.95, 0.8, 0.97, STOP_IDS, 0.8, 0.05)
STUDENT, TEACHER = Sampler(0.9, 0.95), Sampler(0.8, 0.97)

VERDICTS: dict[str, oracle.Verdict] = {
    "top_k": lambda _student, teacher, token, _u: oracle.in_top_k(teacher, token, 40),
    "top_p": lambda _student, teacher, token, _u: oracle.in_top_p(teacher, token, 0.8),
    "min_p": lambda _student, teacher, token, _u: oracle.in_min_p(teacher, token, 0.05),
    "speculative": lambda student, teacher, token, u: oracle.passes_ratio_test(
        oracle.warped(student, STUDENT), oracle.warped(teacher, TEACHER), token, u
    ),
}
# name -> (rule, replacement)
CASES = {
    **{rule: (rule, "sample") for rule in VERDICTS},
    "top_k_argmax": ("top_k", "argmax"),
    "min_p_argmax": ("min_p", "argmax"),
}
FAMILIES = {"llama": 0.02, "gemma2": 0.04}  # and by how much the teacher differs


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


@cache
def models_of(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher is the student, disturbed: unrelated models would agree on nothing."""
    student, teacher = (tiny_model(family, seed=1, sharpness=2.0) for _ in range(2))
    torch.manual_seed(9)
    for parameter in teacher.parameters():
        parameter.add_(FAMILIES[family] * torch.randn_like(parameter))
    return student, teacher


PROMPTS = random_prompts(5, PROMPT_LENGTHS)


def prompts_of(start: int, stop: int) -> Prompts:
    rows = list(range(len(PROMPTS)))[start:stop]
    return Prompts(
        ids=tuple(torch.tensor(PROMPTS[i]) for i in rows),
        streams=row_streams(SEED, EPOCH, torch.tensor(rows) + FIRST_SAMPLE),
        max_new_tokens=torch.tensor([MAX_NEW[i] for i in rows]),
    )


@cache
def expected_rows(family: str, name: str, bonus_after: int | None = None) -> list[OracleRow]:
    rule, replacement = CASES[name]
    student, teacher = (oracle.uncached(model) for model in models_of(family))
    return [
        oracle.interleave(
            student,
            teacher,
            prompt,
            Key(SEED, EPOCH, FIRST_SAMPLE + i),
            MAX_NEW[i],
            STUDENT,
            TEACHER,
            top_k=0,
            stop_ids=STOP_IDS,
            verdict=VERDICTS[rule],
            residual=rule == "speculative",
            argmax=replacement == "argmax",
            bonus_after=bonus_after,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def engine_of(family: str, name: str, **options: Any) -> RolloutEngine:
    rule = ACCEPTANCE_RULES[CASES[name][0]]
    return RolloutEngine(*map(CausalLM, models_of(family)), accept=rule, **options)


def params_of(name: str, num_draft_tokens: Any, bonus_token: bool = False) -> SamplingParams:
    return replace(
        PARAMS,
        num_draft_tokens=num_draft_tokens,
        replacement=CASES[name][1],
        bonus_token=bonus_token,
    )


def rows_of(rollout: Rollout) -> list[OracleRow]:
    return [
        OracleRow(
            completion=rollout.completion_ids[i, :length].tolist(),
            accepted=rollout.accepted_mask[i, :length].tolist(),
            proposed=rollout.proposed_ids[i, :length].tolist(),
            finish=FinishReason(int(rollout.finish_reasons[i])).name,
        )
        for i, length in enumerate(rollout.completion_lengths.tolist())
    ]


# --- against the oracle -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cases_are_worth_something(family: str, name: str) -> None:
    """Both verdicts occur, whole proposals are kept, and the rules differ."""
    rows = expected_rows(family, name)
    verdicts = [verdict for row in rows for verdict in row.accepted]
    assert len(verdicts) > 60
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.95
    assert any("AAAAA" in "".join("RA"[verdict] for verdict in row.accepted) for row in rows)
    others = [expected_rows(family, other) for other in CASES if other != name]
    assert all(rows != other for other in others)


@pytest.mark.parametrize(("num_draft_tokens", "batch_size"), [(1, 3), (2, 8), (5, 1), (5, 8)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_equals_the_oracle(
    family: str, name: str, num_draft_tokens: int, batch_size: int
) -> None:
    expected, params = expected_rows(family, name), params_of(name, num_draft_tokens)
    for start in range(0, len(expected), batch_size):
        prompts = prompts_of(start, start + batch_size)
        got = engine_of(family, name).interleave(prompts, params)
        assert rows_of(got) == expected[start : start + batch_size]


@pytest.mark.parametrize("name", ["speculative", "top_p"])
def test_no_way_of_going_about_it_changes_a_token(name: str) -> None:
    for options, draft in (
        ({"rollout_batch_size": 3}, 5),
        ({"patient": False, "fixed_shapes": True}, AUTO),
    ):
        got = engine_of("llama", name, **options).interleave(
            prompts_of(0, 8), params_of(name, draft)
        )
        assert rows_of(got) == expected_rows("llama", name)


# Bonus tokens: G is part of what the oracle is told.


@pytest.mark.parametrize(("num_draft_tokens", "batch_size"), [(1, 3), (2, 8), (5, 1), (5, 8)])
@pytest.mark.parametrize("name", ["top_k", "speculative", "top_k_argmax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bonus_tokens_equal_the_oracles(
    family: str, name: str, num_draft_tokens: int, batch_size: int
) -> None:
    expected = expected_rows(family, name, num_draft_tokens)
    params = params_of(name, num_draft_tokens, bonus_token=True)
    assert sum(row.proposed.count(-1) for row in expected) > 2
    for start in range(0, len(expected), batch_size):
        prompts = prompts_of(start, start + batch_size)
        got = engine_of(family, name).interleave(prompts, params)
        assert rows_of(got) == expected[start : start + batch_size]


@pytest.mark.parametrize("name", ["top_k", "speculative"])
def test_a_bonus_tokens_state_is_stored_too(name: str) -> None:
    """All stored states, bonus tokens' included, are those of a fresh forward."""
    engine = engine_of("llama", name, rollout_batch_size=3)
    got = engine.interleave(prompts_of(0, 8), params_of(name, 2, bonus_token=True))
    bonus = 0
    for i, prompt in enumerate(PROMPTS):
        completion = got.unpadded()[i]
        ids = torch.cat([torch.tensor(prompt), completion])
        fresh = models_of("llama")[1](input_ids=ids[None], use_cache=False).logits[0]
        kept = engine.teacher.logits(got.teacher_hidden[i, : len(completion)])
        assert closeness(kept, fresh[len(prompt) - 1 : -1]) < 1e-5
        bonus += int((got.proposed_ids[i, : len(completion)] == -1).sum())
    assert bonus > 5


def test_a_bonus_token_needs_a_fixed_draft_length() -> None:
    with pytest.raises(ValueError, match="draft length, which must then be fixed"):
        params_of("top_k", AUTO, bonus_token=True)


# Limits


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("top_k", {"teacher_top_k": 300}),
        ("top_p", {"acceptance_top_p": 1.0}),
        ("min_p", {"acceptance_min_p": 1e-300}),
    ],
)
def test_accepting_everything_is_on_policy(rule: str, keys: dict[str, Any]) -> None:
    engine, params = engine_of("llama", rule), replace(params_of(rule, 5), **keys)
    interleaved = engine.interleave(prompts_of(0, 8), params)
    assert rows_of(interleaved) == rows_of(engine.sample_student(prompts_of(0, 8), params))


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("top_k", {"teacher_top_k": 1}),
        ("top_p", {"acceptance_top_p": 1e-9}),
        ("min_p", {"acceptance_min_p": 1.0}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_accepting_only_the_best_and_argmax_is_greedy(
    family: str, rule: str, keys: dict[str, Any]
) -> None:
    """Whatever the teacher's temperature: K = 1 with argmax is the teacher's greedy text."""
    params = replace(params_of(rule, 5), replacement="argmax", **keys)
    got = engine_of(family, rule).interleave(prompts_of(0, 8), params)
    next_logits = oracle.uncached(models_of(family)[1])
    for i, completion in enumerate(got.unpadded()):
        prefix = list(PROMPTS[i])
        for token in completion.tolist():
            logits = next_logits(prefix)
            assert token == logits.index(max(logits))
            prefix.append(token)


def test_the_ratio_test_of_equal_models_keeps_everything() -> None:
    """p = q: no rejection, and no residual to stumble over."""
    student = CausalLM(models_of("llama")[0])
    params = replace(
        params_of("speculative", 5), teacher_temperature=0.9, teacher_top_p=0.95, stop_token_ids=()
    )
    got = RolloutEngine(student, student, accept=RatioTest()).interleave(prompts_of(0, 8), params)
    # u q(x) < p(x), with u at most 1 - 2^-53 and p, q equal up to the rounding of two forwards.
    assert got.accepted_mask.sum() >= got.completion_mask.sum() - 1


# --- by hand ----------------------------------------------------------------------------------

# Probabilities .4 .3 .2 .1 of the tokens 2, 0, 3, 1.
LOGITS = torch.tensor([0.3, 0.1, 0.4, 0.2]).double().log()
EVERY = torch.arange(4)[None]


def kept(rule: Any, **keys: float) -> list[int]:
    """Which tokens a rule keeps, each proposed at a position of its own."""
    logits = LOGITS.expand(1, 4, 4)
    verdicts = rule(logits, EVERY, torch.zeros(1, 4), replace(PARAMS, **keys))
    return EVERY[verdicts].tolist()


@pytest.mark.parametrize(
    ("mass", "tokens"),
    [
        (0.01, [2]),
        (0.39, [2]),
        (0.41, [0, 2]),
        (0.69, [0, 2]),
        (0.71, [0, 2, 3]),
        (1, [0, 1, 2, 3]),
    ],
)
def test_top_p_by_hand(mass: float, tokens: list[int]) -> None:
    assert kept(accept_top_p, acceptance_top_p=mass) == tokens


@pytest.mark.parametrize(
    ("share", "tokens"),
    [(1.0, [2]), (0.76, [2]), (0.74, [0, 2]), (0.49, [0, 2, 3]), (0.2, [0, 1, 2, 3])],
)
def test_min_p_by_hand(share: float, tokens: list[int]) -> None:
    assert kept(accept_min_p, acceptance_min_p=share) == tokens


def test_ties_in_the_nucleus_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, 4, 4)
    params = replace(PARAMS, acceptance_top_p=0.5)
    assert accept_top_p(logits, EVERY, torch.zeros(1, 4), params).tolist() == [
        [True, True, False, False]
    ]


def test_argmax_ties_go_to_the_lower_id_and_ignore_the_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    warm = replace(PARAMS, replacement="argmax", teacher_temperature=50.0)
    chosen = teacher_replacement(logits, warm)
    for u in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((2,), u, dtype=torch.float64)
        tokens = sample_top_p(chosen.logits, chosen.temperature, chosen.top_p, uniforms)
        assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.3, 1e-9])
def test_warped_probabilities_are_those_of_the_sampler(temperature: float, top_p: float) -> None:
    """The measure of the u that give each token, read off a grid of them."""
    logits = LOGITS[None]
    probs = warped_probs(logits, temperature, top_p)[0]
    expected = oracle.warped(LOGITS.tolist(), Sampler(temperature, top_p))
    assert probs.tolist() == pytest.approx([expected.get(t, 0.0) for t in range(4)], abs=1e-12)
    count = 2000
    grid = (torch.arange(count).double() + 0.5) / count
    tokens = sample_top_p(logits.expand(count, -1), temperature, top_p, grid)
    shares = torch.bincount(tokens, minlength=4).double() / count
    assert (shares - probs).abs().max() <= 1 / count


def test_the_ratio_test_by_hand() -> None:
    """q = (.5, .25, .25), p = (.25, .25, .5): kept up to u = .5, always, always; residual: token 2."""
    student = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    teacher = torch.tensor([[0.25, 0.25, 0.5]]).double().log()
    params = replace(
        PARAMS,
        student_temperature=1.0,
        student_top_p=1.0,
        teacher_temperature=1.0,
        teacher_top_p=1.0,
    )
    ratio, proposed = RatioTest(), torch.tensor([[0, 0, 1, 2]])
    q = torch.stack([ratio.proposal_probs(student, proposed[:, i], params) for i in range(4)], 1)
    assert q[0].tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25])
    u = torch.tensor([[0.49, 0.51, 0.99, 0.99]]).double()
    accepted = ratio.accept(teacher[:, None].expand(1, 4, 3), proposed, q, u, params)
    assert accepted.tolist() == [[True, False, True, True]]
    both = [p.expand(2, -1) for p in (teacher, student)]
    chosen = ratio.replacement(*both, torch.tensor([True, False]), params)
    probs = warped_probs(chosen.logits, chosen.temperature, chosen.top_p)
    torch.testing.assert_close(probs, torch.tensor([[0, 0, 1], [0.25, 0.25, 0.5]]).double())


# --- distribution -----------------------------------------------------------------------------


class TableLM:
    """A Markov chain: the logits after a token are a row of a table; hidden states are logits."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        self.table, self.vocab_size = table, table.shape[1]

    def new_cache(self, num_rows: int, num_slots: int) -> TableLM:
        return self

    def keep_rows(self, index: Tensor) -> None:
        """Nothing is kept."""

    def prefill(self, ids: Tensor, rows: Tensor, cache: Any) -> None:
        """Nothing is kept."""

    def forward(self, ids: Tensor, positions: Tensor, cache: Any, longest: int) -> Tensor:
        return self.table[ids]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


NUM_ROWS, LENGTH, NUM_TOKENS = 20_000, 3, 5
FALSE_ALARM = 1e-9


def chains() -> tuple[TableLM, TableLM]:
    torch.manual_seed(4)
    return TableLM(2 * torch.randn(NUM_TOKENS, NUM_TOKENS)), TableLM(2 * torch.randn(5, NUM_TOKENS))


def distance_to_the_teacher(rule: str, params: SamplingParams) -> tuple[float, float]:
    """Total variation between sampled triples of tokens and the teacher's own, and its bound.

    McDiarmid: a triple changes the distance by at most 1/n, so it exceeds its mean by t with
    probability at most exp(-2 n t^2); and the mean is at most sum sqrt(P / n) / 2.
    """
    student, teacher = chains()
    prompts = Prompts(
        tuple(torch.zeros(NUM_ROWS, 1, dtype=torch.long)),
        row_streams(8, 0, torch.arange(NUM_ROWS)),
        torch.full((NUM_ROWS,), LENGTH),
    )
    engine = RolloutEngine(student, teacher, accept=ACCEPTANCE_RULES[rule])
    counts = Counter(map(tuple, engine.interleave(prompts, params).completion_ids.tolist()))
    after = [
        oracle.warped(row, Sampler(params.teacher_temperature, params.teacher_top_p))
        for row in teacher.table.double().tolist()
    ]
    distance = spread = 0.0
    for triple in itertools.product(range(NUM_TOKENS), repeat=LENGTH):
        probability = math.prod(
            after[a].get(b, 0.0) for a, b in zip((0, *triple), triple, strict=False)
        )
        distance += abs(counts[triple] / NUM_ROWS - probability) / 2
        spread += math.sqrt(probability / NUM_ROWS) / 2
    return distance, spread + math.sqrt(math.log(1 / FALSE_ALARM) / (2 * NUM_ROWS))


@pytest.mark.parametrize(
    ("student_top_p", "teacher_temperature", "teacher_top_p"), [(1.0, 1.0, 1.0), (0.8, 1.3, 0.9)]
)
@pytest.mark.parametrize(("num_draft_tokens", "bonus_token"), [(1, False), (2, False), (2, True)])
def test_the_ratio_test_samples_as_the_teacher_does(
    num_draft_tokens: int,
    bonus_token: bool,
    student_top_p: float,
    teacher_temperature: float,
    teacher_top_p: float,
) -> None:
    params = SamplingParams(
        num_draft_tokens,
        2,
        0.7,
        student_top_p,
        teacher_temperature,
        teacher_top_p,
        (),
        bonus_token=bonus_token,
    )
    distance, bound = distance_to_the_teacher("speculative", params)
    assert distance < bound < 0.08


def test_the_distance_tells_rules_apart() -> None:
    """SKD's own rule does not preserve the teacher's distribution, and the test above would see it."""
    distance, bound = distance_to_the_teacher("top_k", SamplingParams(2, 2, 0.7, 1.0, 1.0, 1.0, ()))
    assert distance > 2 * bound
