"""alpha against a naive float64 sum, in chunks and across architectures."""

from __future__ import annotations

import pytest
import torch

from axolotl_skd.draft_report.closed_form import completion_overlaps, overlap
from axolotl_skd.draft_report.measure import expected_acceptance
from axolotl_skd.rollout.lm import CausalLM
from tests.draft_report.pairs import memoryless, pair
from tests.rollout.tiny import random_prompts, tiny_model

PROMPT, COMPLETION = random_prompts(1, [7, 11])


@torch.no_grad()
def naive(teacher, student, prompt: list[int], completion: list[int]) -> list[float]:
    """Token by token, vocabulary entry by vocabulary entry, in Python floats of float64 softmaxes."""
    values = []
    for t in range(len(completion)):
        ids = torch.tensor([[*prompt, *completion[:t]]])
        p, q = (
            lm(ids, use_cache=False).logits[0, -1].double().softmax(-1).tolist()
            for lm in (teacher, student)
        )
        values.append(sum(min(a, b) for a, b in zip(p, q, strict=True)))
    return values


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_overlaps_are_those_of_a_naive_loop(family: str, chunk: int) -> None:
    teacher, student = tiny_model(family, 1), tiny_model(family, 2)
    got = completion_overlaps(CausalLM(teacher), CausalLM(student), PROMPT, COMPLETION, chunk)
    expected = naive(teacher, student, PROMPT, COMPLETION)
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    assert got.std() > 0.01  # positions differ, so that a shift would be seen


def test_overlap_is_one_at_equality_zero_when_disjoint_and_symmetric() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    torch.testing.assert_close(overlap(a, a), torch.ones(5))
    torch.testing.assert_close(overlap(a, b), overlap(b, a))
    inf = float("inf")
    left, right = torch.tensor([0.0, -inf]), torch.tensor([-inf, 0.0])
    assert overlap(left, right) == 0
    variation = (a.double().softmax(-1) - b.double().softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(overlap(a, b).double(), 1 - variation, rtol=1e-6, atol=1e-6)


def test_alpha_is_the_mean_over_positions_not_over_texts() -> None:
    teacher, student = pair()
    prompts, completions = [[1, 2], [3, 4]], [[5], [6, 8, 9, 10, 11]]
    alphas = expected_acceptance(
        teacher, {"before": teacher, "after": student}, prompts, completions
    )
    values = [
        value
        for prompt, completion in zip(prompts, completions, strict=True)
        for value in naive(teacher, student, prompt, completion)
    ]
    assert alphas["before"] == pytest.approx(1, abs=1e-6)
    assert alphas["after"] == pytest.approx(sum(values) / 6, abs=1e-5)


def test_known_distributions() -> None:
    p, q = [0.1, 0.6, 0.3], [0.5, 0.2, 0.3]
    teacher, student = CausalLM(memoryless(p)), CausalLM(memoryless(q))
    got = completion_overlaps(teacher, student, [1], [2, 0, 1])
    torch.testing.assert_close(got, torch.full((3,), 0.6), rtol=0, atol=1e-5)
