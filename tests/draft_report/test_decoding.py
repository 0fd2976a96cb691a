"""Assisted generation is counted right, keeps the teacher's output, and warps each model once."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

from axolotl_skd.draft_report.counting import SpeculationCounts, total
from axolotl_skd.draft_report.decoding import decode, forget_generation_settings, make_draft
from tests.draft_report.naive import naive_greedy
from tests.draft_report.pairs import decoding, memoryless, model, pair
from tests.rollout.tiny import one_thread, random_prompts

PROMPTS = [[id % 40 for id in ids] for ids in random_prompts(3, [4, 9, 6, 13, 5])]


@pytest.mark.parametrize("num_draft", [1, 3, 6])
def test_greedy_tokens_and_counts_are_those_of_a_naive_loop(num_draft: int) -> None:
    teacher, student = pair(num_draft)
    how, counts = decoding(), []
    with one_thread():
        for prompt in PROMPTS:
            ids, expected = naive_greedy(teacher, student, prompt, num_draft, how)
            completion = decode(teacher, student, prompt, how, seed=0)
            assert list(completion.ids) == ids
            assert completion.counts == expected
            assert completion.ids == decode(teacher, None, prompt, how, seed=0).ids
            counts.append(completion.counts)
    # Not trivial: some kept, some not, rounds thrown away in part.
    everything = total(counts)
    assert 0 < everything.accepted < everything.verified
    assert num_draft == 1 or everything.verified < everything.proposed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_student_that_is_the_teacher_is_always_accepted(temperature: float) -> None:
    teacher, student = model(1), model(1)
    forget_generation_settings(teacher)
    make_draft(student, 4)
    how = decoding(temperature, max_new_tokens=11, stop_token_ids=(39,))
    with one_thread():
        completion = decode(teacher, student, PROMPTS[0], how, seed=1)
    assert completion.counts.acceptance_rate == 1
    if len(completion.ids) == 11:  # rounds of 4 + 1, and one left
        assert completion.counts == SpeculationCounts(8, 8, 8, 3, 11)


def test_the_teacher_alone_has_no_counts_and_time_passes() -> None:
    teacher, _ = pair()
    completion = decode(teacher, None, PROMPTS[0], decoding(), seed=0)
    assert completion.counts is None
    assert completion.seconds > 0


def test_samples_follow_the_seed() -> None:
    teacher, student = pair()
    how = decoding(1.0, stop_token_ids=(39,))
    for draft in (None, student):
        first, again, other = (decode(teacher, draft, PROMPTS[0], how, seed) for seed in (1, 1, 2))
        assert first.ids == again.ids != other.ids


def test_nothing_is_inherited_from_a_checkpoints_generation_config() -> None:
    teacher, student = pair()
    how = decoding(max_new_tokens=16)
    plain = decode(teacher, student, PROMPTS[1], how, seed=0).ids
    teacher.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert decode(teacher, None, PROMPTS[1], how, seed=0).ids != plain
    forget_generation_settings(teacher)
    assert decode(teacher, None, PROMPTS[1], how, seed=0).ids == plain


def test_sampling_is_from_the_whole_vocabulary() -> None:
    """transformers would keep 50 of 200 tokens by default; 300 draws hit about 150 of them."""
    weights = [200.0 + i for i in range(200)]
    lm = memoryless([weight / sum(weights) for weight in weights])
    forget_generation_settings(lm)
    how = decoding(1.0, max_new_tokens=240, stop_token_ids=(0,))
    tokens = {token for seed in range(3) for token in decode(lm, None, [1], how, seed).ids}
    assert len(tokens) > 60


# Samples of models without memory are independent draws from known distributions. Token 0 stops, but
# never comes, so that the number of tokens is fixed.

NEVER = 1e-12
APART = [NEVER, 0.45, 0.07, 0.28, 0.15, 0.05], [NEVER, 0.10, 0.37, 0.13, 0.35, 0.05]
NEAR = [NEVER, 0.44, 0.03, 0.42, 0.06, 0.05], [NEVER, 0.46, 0.04, 0.36, 0.09, 0.05]
FALSE_ALARM = 1e-9


def warped(probabilities: list[float], temperature: float, top_p: float) -> torch.Tensor:
    """Temperature, then the smallest nucleus of at least `top_p`, in float64."""
    probs = torch.tensor(probabilities, dtype=torch.float64) ** (1 / temperature)
    probs /= probs.sum()
    order = probs.argsort(descending=True)
    keep = probs[order].cumsum(0) - probs[order] < top_p
    probs[order[~keep]] = 0
    return probs / probs.sum()


# Were the student warped twice, it would be accepted less: by .25 for T = 1/4, by .16 for top-p .8.
@pytest.mark.parametrize(
    ("probabilities", "temperature", "top_p", "num_tokens"),
    [(APART, 1.0, 1.0, 500), (NEAR, 0.25, 1.0, 1000), (APART, 1.0, 0.8, 1000)],
)
def test_sampling_keeps_the_teachers_distribution_and_the_predicted_acceptance(
    probabilities: tuple[list[float], list[float]],
    temperature: float,
    top_p: float,
    num_tokens: int,
) -> None:
    """By Hoeffding's inequality (Azuma's for the verdicts, of which there are at most N)."""
    teacher, student = map(memoryless, probabilities)
    forget_generation_settings(teacher)
    make_draft(student, 2)
    how = decoding(temperature, max_new_tokens=100, top_p=top_p, stop_token_ids=(0,))
    with one_thread():
        completions = [
            decode(teacher, student, [1, 2, 3], how, seed) for seed in range(num_tokens // 100)
        ]
    tokens = torch.tensor([token for completion in completions for token in completion.ids])
    counts = total([completion.counts for completion in completions])
    assert len(tokens) == num_tokens

    p, q = (warped(probs, temperature, top_p) for probs in probabilities)
    allowed = math.sqrt(num_tokens * math.log(2 * (len(p) + 1) / FALSE_ALARM) / 2)
    observed = torch.bincount(tokens, minlength=len(p))
    assert float((observed - num_tokens * p).abs().max()) < allowed
    acceptance = float(torch.minimum(p, q).sum())
    assert abs(counts.accepted - acceptance * counts.verified) < allowed
