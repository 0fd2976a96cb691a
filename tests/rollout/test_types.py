"""The records of a rollout refuse what makes no sense, and cut out rows without padding."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source

VALID = SamplingParams(
    num_draft_tokens=5,
    teacher_top_k=25,
    student_temperature=0.5,
    student_top_p=0.5,
    teacher_temperature=0.2,
    teacher_top_p=1.0,
    stop_token_ids=(0,),
)


@pytest.mark.parametrize("name", ["num_draft_tokens", "teacher_top_k"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        replace(VALID, **{name: value})


@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
@pytest.mark.parametrize("value", [0.0, -0.5, float("nan")])
def test_temperatures_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be > 0, got {value}"):
        replace(VALID, **{name: value})


@pytest.mark.parametrize("name", ["student_top_p", "teacher_top_p"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, float("nan")])
def test_top_p_must_be_a_mass(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\], got {value}"):
        replace(VALID, **{name: value})


def test_the_smallest_and_largest_valid_parameters_are_taken() -> None:
    replace(VALID, num_draft_tokens=1, teacher_top_k=1, student_top_p=1.0, teacher_top_p=1e-9)
    replace(VALID, student_temperature=1e-9, teacher_temperature=100.0, stop_token_ids=())


def prompts(lengths: list[int], max_new: list[int]) -> Prompts:
    ids = tuple(torch.arange(length) for length in lengths)
    return Prompts(ids, torch.arange(len(lengths)), torch.tensor(max_new))


def test_prompts_need_a_row() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        Prompts((), torch.zeros(0, dtype=torch.long), torch.ones(0, dtype=torch.long))


def test_prompts_need_a_token_in_every_row() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        prompts([3, 0], [5, 5])


def test_prompts_need_room_in_every_row() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        prompts([3, 1], [5, 0])


def test_prompts_need_one_stream_and_length_per_row() -> None:
    with pytest.raises(ValueError, match="2 prompts, 2 streams and 1 lengths"):
        prompts([3, 1], [5])


@pytest.fixture
def rollout() -> Rollout:
    """Completions of 4, 1 and 2 tokens; token 0 is a real token of row 2."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0], [3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    return Rollout(
        completion_ids=ids,
        completion_mask=mask,
        accepted_mask=mask & (ids > 4),
        proposed_ids=torch.where(mask, ids + 1, -1),
        teacher_hidden=torch.arange(24.0).view(3, 4, 2),
        finish_reasons=torch.tensor([FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP]),
        num_proposed=torch.tensor([8, 5, 5]),
        source=Source.INTERLEAVED,
        num_rounds=3,
        num_draft_steps=9,
    )


def test_lengths_and_rows_follow_the_mask_not_the_ids(rollout: Rollout) -> None:
    assert rollout.completion_lengths.tolist() == [4, 1, 2]
    assert [ids.tolist() for ids in rollout.unpadded()] == [[5, 6, 7, 8], [9], [3, 0]]


def test_select_cuts_rows_and_trims_to_their_longest(rollout: Rollout) -> None:
    part = rollout.select(1, 3)
    assert part.completion_ids.tolist() == [[9, 0], [3, 0]]
    assert part.completion_mask.tolist() == [[True, False], [True, True]]
    assert part.accepted_mask.tolist() == [[True, False], [False, False]]
    assert part.proposed_ids.tolist() == [[10, -1], [4, 1]]
    assert part.teacher_hidden.tolist() == [[[8, 9], [10, 11]], [[16, 17], [18, 19]]]
    assert part.finish_reasons.tolist() == [FinishReason.STOP, FinishReason.STOP]
    assert part.num_proposed.tolist() == [5, 5]
    assert (part.source, part.num_rounds) == (Source.INTERLEAVED, 3)


def test_select_of_everything_changes_nothing(rollout: Rollout) -> None:
    everything = rollout.select(0, 3)
    for name in Rollout.__dataclass_fields__:
        before, after = getattr(rollout, name), getattr(everything, name)
        assert torch.equal(before, after) if torch.is_tensor(before) else before == after, name


def test_select_without_hidden_states(rollout: Rollout) -> None:
    assert replace(rollout, teacher_hidden=None).select(0, 1).teacher_hidden is None


def test_records_are_frozen(rollout: Rollout) -> None:
    with pytest.raises(FrozenInstanceError):
        rollout.num_rounds = 4
    with pytest.raises(FrozenInstanceError):
        VALID.teacher_top_k = 1
