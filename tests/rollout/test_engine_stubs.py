"""The engine on models whose logits are written by hand: tokens, counts, bookkeeping to the letter.

Every expected number below was counted by hand.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.types import FinishReason, Rollout, Source
from tests.rollout.scripted import (
    VOCAB_SIZE,
    Script,
    ScriptedLM,
    after,
    batch,
    completions,
    count_up,
    params_of,
    skip_before_multiples_of_four,
    skip_one,
)

STOP, LENGTH = int(FinishReason.STOP), int(FinishReason.LENGTH)


def rollout(
    student: Script | ScriptedLM,
    teacher: Script | ScriptedLM,
    prompts: list[list[int]],
    max_new: list[int],
    num_draft_tokens: int,
    top_k: int = 1,
    stop_ids: tuple[int, ...] = (),
) -> Rollout:
    """Interleave; the nuclei are so small that only the most likely token is ever sampled."""
    models = (m if isinstance(m, ScriptedLM) else ScriptedLM(m) for m in (student, teacher))
    params = params_of(num_draft_tokens, top_k, stop_ids)
    return RolloutEngine(*models).interleave(batch(prompts, max_new), params)


# --- never, always, sometimes -----------------------------------------------------------------


def test_never_accepted() -> None:
    """One replacement per round, every proposal after the first paid for in vain."""
    result = rollout(count_up, skip_one, [[3], [7, 20]], [4, 4], num_draft_tokens=3)
    assert completions(result) == [[5, 7, 9, 11], [22, 24, 26, 28]]
    assert result.proposed_ids.tolist() == [[4, 6, 8, 10], [21, 23, 25, 27]]
    assert not result.accepted_mask.any()
    # 4 rounds; the last two have only 2 and 1 tokens to go: 3 + 3 + 2 + 1.
    assert (result.num_rounds, result.num_proposed.tolist()) == (4, [9, 9])
    assert result.finish_reasons.tolist() == [LENGTH, LENGTH]


def test_always_accepted_and_no_bonus_token() -> None:
    """The teacher tolerates the student (K = 2) but would itself say something else."""
    result = rollout(count_up, skip_one, [[3], [7, 20]], [8, 8], num_draft_tokens=3, top_k=2)
    assert completions(result) == [list(range(4, 12)), list(range(21, 29))]
    assert result.accepted_mask.all()
    assert torch.equal(result.proposed_ids, result.completion_ids)
    assert (result.num_rounds, result.num_proposed.tolist()) == (3, [8, 8])  # 3 + 3 + 2


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4, 8, 20])
def test_no_draft_length_takes_a_bonus_token(num_draft_tokens: int) -> None:
    result = rollout(count_up, skip_one, [[0]], [8], num_draft_tokens, top_k=2)
    assert completions(result) == [list(range(1, 9))]
    assert result.num_rounds == -(-8 // num_draft_tokens)
    assert result.num_proposed.tolist() == [8]


def test_sometimes_accepted() -> None:
    """Row 0: 2 | 3 5! | 6 7 9! ; the student wanted 4 and 8 there."""
    result = rollout(
        count_up, skip_before_multiples_of_four, [[1], [4, 2]], [6, 6], num_draft_tokens=3
    )
    assert completions(result) == [[2, 3, 5, 6, 7, 9], [3, 5, 6, 7, 9, 10]]
    assert result.proposed_ids.tolist() == [[2, 3, 4, 6, 7, 8], [3, 4, 6, 7, 8, 10]]
    assert result.accepted_mask.tolist() == [
        [True, True, False, True, True, False],
        [True, False, True, True, False, True],
    ]
    # Row 0: [2 3 4!] [6 7 8!]; row 1: [3 4!] [6 7 8!] [10] with one token to go.
    assert (result.num_rounds, result.num_proposed.tolist()) == (3, [6, 7])


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 5, 9, 30])
def test_the_draft_length_is_only_a_matter_of_speed(num_draft_tokens: int) -> None:
    result = rollout(
        count_up, skip_before_multiples_of_four, [[1], [9, 4, 2]], [9, 4], num_draft_tokens
    )
    assert completions(result) == [[2, 3, 5, 6, 7, 9, 10, 11, 13], [3, 5, 6, 7]]


def test_rows_of_different_tempers_share_a_batch() -> None:
    """The first prompt token says how strict the teacher is."""

    def teacher(prefix: list[int]) -> list[int]:
        return {0: count_up, 1: skip_one, 2: skip_before_multiples_of_four}[prefix[0]](prefix)

    prompts = [[1, 10], [0, 5, 30], [2, 2], [1, 8, 8, 40]]
    result = rollout(count_up, teacher, prompts, [3, 7, 5, 1], num_draft_tokens=4)
    assert completions(result) == [
        [12, 14, 16],
        [31, 32, 33, 34, 35, 36, 37],
        [3, 5, 6, 7, 9],
        [42],
    ]
    # Rounds: row 0 three times 1; row 1 4 + 3; row 2 2 + 3; row 3 once 1. Sizes 4, 4, then 1 for
    # row 0 alone (max_new 3, two done).
    assert result.num_rounds == 3
    assert result.num_proposed.tolist() == [4 + 3 + 1, 4 + 3, 4 + 3, 4]
    assert result.completion_lengths.tolist() == [3, 7, 5, 1]


# --- stop tokens ------------------------------------------------------------------------------


def test_a_stop_token_inside_a_proposal_ends_the_row_there() -> None:
    result = rollout(count_up, count_up, [[2], [20]], [12, 12], num_draft_tokens=5, stop_ids=(5, 9))
    assert completions(result) == [[3, 4, 5], list(range(21, 33))]
    assert result.finish_reasons.tolist() == [STOP, LENGTH]
    assert result.num_proposed.tolist() == [5, 12]
    assert result.accepted_mask[0].tolist() == [True] * 3 + [False] * 9


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4, 5, 6])
def test_a_stop_token_ends_the_row_for_every_draft_length(num_draft_tokens: int) -> None:
    result = rollout(count_up, count_up, [[2]], [12], num_draft_tokens, stop_ids=(6,))
    assert completions(result) == [[3, 4, 5, 6]]
    assert result.finish_reasons.tolist() == [STOP]


def test_a_replacement_may_be_the_stop_token() -> None:
    result = rollout(count_up, skip_one, [[2]], [12], num_draft_tokens=4, stop_ids=(6,))
    assert completions(result) == [[4, 6]]
    assert result.accepted_mask.tolist() == [[False, False]]
    assert result.finish_reasons.tolist() == [STOP]


def test_a_rejected_or_discarded_stop_token_ends_nothing() -> None:
    """Every round proposes one of them first, which is rejected."""
    result = rollout(count_up, skip_one, [[2]], [3], num_draft_tokens=4, stop_ids=(3, 5, 7))
    assert completions(result) == [[4, 6, 8]]
    assert result.finish_reasons.tolist() == [LENGTH]


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    result = rollout(count_up, count_up, [[7, 7], [7]], [2, 3], num_draft_tokens=2, stop_ids=(7,))
    assert completions(result) == [[8, 9], [8, 9, 10]]


def test_a_stop_token_at_the_limit_counts_as_stop() -> None:
    result = rollout(count_up, count_up, [[2], [1]], [3, 3], num_draft_tokens=5, stop_ids=(5,))
    assert completions(result) == [[3, 4, 5], [2, 3, 4]]
    assert result.finish_reasons.tolist() == [STOP, LENGTH]


def test_a_stop_token_behind_the_limit_is_not_reached() -> None:
    result = rollout(count_up, count_up, [[2], [1]], [2, 9], num_draft_tokens=5, stop_ids=(5,))
    assert completions(result) == [[3, 4], [2, 3, 4, 5]]
    assert result.finish_reasons.tolist() == [LENGTH, STOP]


def test_the_stop_token_may_be_the_pad_token() -> None:
    """Token 0 pads prompts and results; as a stop token it still belongs to the completion."""
    result = rollout(
        count_up, count_up, [[48], [0, 0, 10, 46]], [9, 9], num_draft_tokens=5, stop_ids=(0,)
    )
    assert completions(result) == [[49, 0], [47, 48, 49, 0]]
    assert result.completion_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert result.finish_reasons.tolist() == [STOP, STOP]


# --- ends, limits, bookkeeping ----------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
def test_nothing_stands_after_the_end(num_draft_tokens: int) -> None:
    max_new = [1, 6, 2, 9]
    prompts = [[10], [1, 20], [2, 3, 30], [1, 2, 3, 4]]
    result = rollout(count_up, skip_before_multiples_of_four, prompts, max_new, num_draft_tokens)
    end = result.completion_mask.long().sum(1)
    assert end.tolist() == max_new
    outside = ~result.completion_mask
    assert result.completion_ids.shape == (4, 9)
    assert (result.completion_ids[outside] == 0).all()
    assert (result.proposed_ids[outside] == -1).all()
    assert not result.accepted_mask[outside].any()
    assert (result.teacher_hidden[outside] == 0).all()
    # And the mask has no holes.
    assert torch.equal(result.completion_mask, torch.arange(9) < end[:, None])


def test_the_record_is_trimmed_to_the_longest_completion() -> None:
    result = rollout(count_up, count_up, [[2], [3]], [30, 40], num_draft_tokens=4, stop_ids=(5,))
    assert result.completion_ids.shape == result.proposed_ids.shape == (2, 3)
    assert result.teacher_hidden.shape == (2, 3, VOCAB_SIZE)


def test_the_stored_hidden_state_predicts_its_token() -> None:
    """The stub's hidden state is its logits: the teacher's favourite after the committed prefix."""
    prompts = [[1], [9, 4, 2]]
    result = rollout(count_up, skip_before_multiples_of_four, prompts, [9, 4], num_draft_tokens=3)
    for i, prompt in enumerate(prompts):
        completion = result.unpadded()[i].tolist()
        prefixes = [prompt + completion[:t] for t in range(len(completion))]
        favourites = [skip_before_multiples_of_four(prefix)[0] for prefix in prefixes]
        assert result.teacher_hidden[i, : len(completion)].argmax(-1).tolist() == favourites


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5, 9])
@pytest.mark.parametrize("teacher_script", [count_up, skip_one, skip_before_multiples_of_four])
def test_no_model_is_asked_for_a_position_it_may_not_have(
    teacher_script: Script, num_draft_tokens: int
) -> None:
    prompts, max_new = [[1], [9, 4, 2], [6, 6]], [7, 3, 1]
    student, teacher = ScriptedLM(count_up), ScriptedLM(teacher_script)
    rollout(student, teacher, prompts, max_new, num_draft_tokens)
    limits = [len(p) + n - 1 for p, n in zip(prompts, max_new, strict=True)]
    for model in (student, teacher):
        for forward, rows in zip(model.fed, model.rows, strict=True):
            for row, at in zip(rows, forward, strict=True):
                assert max(at) <= limits[row]


def test_number_of_forwards() -> None:
    """Per round G student forwards of one token and one teacher forward of G; one prefill each."""
    student, teacher = ScriptedLM(count_up), ScriptedLM(skip_before_multiples_of_four)
    result = rollout(student, teacher, [[1], [9, 4, 2]], [9, 4], num_draft_tokens=3)
    assert (
        teacher.prefilled == student.prefilled == [[1]]
    )  # row 0 has nothing but its pending token
    assert len(teacher.fed) == result.num_rounds
    assert len(student.fed) == sum(len(forward[0]) for forward in teacher.fed)
    assert {len(at) for forward in student.fed for at in forward} == {1}


def test_prompts_of_one_token_need_no_prefill() -> None:
    teacher = ScriptedLM(skip_one)
    result = rollout(count_up, teacher, [[1], [2]], [3, 3], num_draft_tokens=2)
    assert completions(result) == [[3, 5, 7], [4, 6, 8]]
    assert len(teacher.fed) == result.num_rounds == 3
    assert not teacher.prefilled


def test_finished_rows_leave_the_batch() -> None:
    teacher = ScriptedLM(skip_one)
    rollout(count_up, teacher, [[1], [2, 2], [3], [4]], [3, 1, 4, 2], num_draft_tokens=2)
    assert teacher.rows == [[0, 1, 2, 3], [0, 2, 3], [0, 2], [2]]


# --- bonus tokens -----------------------------------------------------------------------------


def with_bonus(
    student: ScriptedLM, teacher: ScriptedLM, max_new: list[int], stop_ids: tuple[int, ...] = ()
) -> Rollout:
    """G = 3 and a teacher that tolerates its second choice (K = 2)."""
    params = params_of(3, top_k=2, stop_ids=stop_ids, bonus_token=True)
    return RolloutEngine(student, teacher).interleave(batch([[3], [7, 20]], max_new), params)


def test_a_bonus_token_follows_every_wholly_accepted_proposal() -> None:
    """The teacher would count in twos: 4 5 6 | 8 | 9 10 11 | 13 | ..., a bonus token every fourth."""
    student, teacher = ScriptedLM(count_up), ScriptedLM(skip_one)
    result = with_bonus(student, teacher, [9, 6])
    assert completions(result) == [
        [4, 5, 6, 8, 9, 10, 11, 13, 14],
        [21, 22, 23, 25, 26, 27],
    ]
    assert result.proposed_ids.tolist() == [
        [4, 5, 6, -1, 9, 10, 11, -1, 14],
        [21, 22, 23, -1, 26, 27, -1, -1, -1],
    ]
    assert result.accepted_mask.tolist() == [
        [True, True, True, False, True, True, True, False, True],
        [True, True, True, False, True, True, False, False, False],
    ]
    # 3 + 3 + 1 proposals for row 0; row 1 takes two of its second three.
    assert (result.num_rounds, result.num_proposed.tolist()) == (3, [7, 6])
    # The teacher sees the pending token and all proposals, the student all but the teacher's tokens.
    assert [len(forward[0]) for forward in teacher.fed] == [4, 4, 2]
    assert len(student.fed) == 4 + 4 + 2
    # The bonus token's state says what comes after the last proposal: 6 -> 8, 11 -> 13.
    favourites = result.teacher_hidden.argmax(-1).tolist()
    assert favourites[0] == [5, 6, 7, 8, 10, 11, 12, 13, 15]


def test_a_bonus_token_may_stop_or_lie_behind_the_end() -> None:
    models = ScriptedLM(count_up), ScriptedLM(skip_one)
    stopped = with_bonus(*models, [9, 9], stop_ids=(8, 22))
    assert completions(stopped) == [[4, 5, 6, 8], [21, 22]]
    assert stopped.finish_reasons.tolist() == [STOP, STOP]
    short = with_bonus(*models, [3, 4], stop_ids=(8,))
    assert completions(short) == [[4, 5, 6], [21, 22, 23, 25]]
    assert short.finish_reasons.tolist() == [LENGTH, LENGTH]


def test_no_bonus_token_after_a_rejection() -> None:
    params = params_of(3, top_k=1, bonus_token=True)
    engine = RolloutEngine(ScriptedLM(count_up), ScriptedLM(skip_before_multiples_of_four))
    result = engine.interleave(batch([[1]], [9]), params)
    # [2 3 4!] [6 7 8!] [10 11 12!] without a whole proposal: as if no bonus token were offered.
    assert completions(result) == [[2, 3, 5, 6, 7, 9, 10, 11, 13]]
    assert (result.proposed_ids >= 0).all()


# --- one model alone --------------------------------------------------------------------------


def test_the_student_alone() -> None:
    engine = RolloutEngine(ScriptedLM(count_up))
    result = engine.sample_student(batch([[2], [8, 20]], [9, 3]), params_of(5, stop_ids=(5,)))
    assert completions(result) == [[3, 4, 5], [21, 22, 23]]
    assert torch.equal(result.accepted_mask, result.completion_mask)
    assert torch.equal(result.proposed_ids, result.completion_ids)
    assert result.finish_reasons.tolist() == [STOP, LENGTH]
    assert (result.source, result.num_rounds) == (Source.STUDENT, 3)
    assert result.num_proposed.tolist() == [3, 3]
    assert result.teacher_hidden is None


def test_the_teacher_alone() -> None:
    student, teacher = ScriptedLM(count_up), ScriptedLM(skip_one)
    engine = RolloutEngine(student, teacher)
    result = engine.sample_teacher(batch([[1], [8, 20]], [9, 3]), params_of(5, stop_ids=(5,)))
    assert completions(result) == [[3, 5], [22, 24, 26]]
    assert not result.accepted_mask.any()
    assert (result.proposed_ids == -1).all()
    assert (result.source, result.num_rounds) == (Source.TEACHER, 3)
    assert result.num_proposed.tolist() == [0, 0]
    assert result.teacher_hidden is None
    assert not student.fed


@pytest.mark.parametrize("method", ["interleave", "sample_teacher"])
def test_without_a_teacher_the_error_says_so(method: str) -> None:
    engine = RolloutEngine(ScriptedLM(count_up))
    with pytest.raises(ValueError, match="needs a teacher"):
        getattr(engine, method)(batch([[1]], [1]), params_of(1))


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1e-3, 1.0), (0.2, 1e-6), (5.0, 0.5), (50.0, 1.0)]
)
def test_sampling_settings_of_the_teacher_do_not_touch_acceptance(
    temperature: float, top_p: float
) -> None:
    """Rank 3 of the raw logits passes K = 3 however the teacher samples; rank 4 never does."""

    def teacher(prefix: list[int]) -> list[int]:
        return after(prefix, 5, 6, 1, 7) if prefix[-1] % 2 else after(prefix, 5, 6, 7, 1)

    params = replace(params_of(4, top_k=3), teacher_temperature=temperature, teacher_top_p=top_p)
    engine = RolloutEngine(ScriptedLM(count_up), ScriptedLM(teacher))
    result = engine.interleave(batch([[1], [2], [33]], [20, 20, 20]), params)
    for i, first in enumerate([1, 2, 33]):
        previous = [first, *result.unpadded()[i].tolist()[:-1]]
        assert result.accepted_mask[i].tolist() == [token % 2 == 1 for token in previous]
