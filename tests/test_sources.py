"""Mixed windows: which rows are rolled out, by a keyed coin, and what becomes of the others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_skd.data import IGNORE_INDEX, pad_rows
from axolotl_skd.rollout.sampling import NonFiniteLogitsError, row_streams
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source
from axolotl_skd.sources import RolloutSource

PARAMS = SamplingParams(3, 2, 1.0, 1.0, 1.0, 1.0, (2,))
COMPLETION = [90, 91, 92]
HIDDEN = 4


def echo(prompts: Prompts, _params: SamplingParams) -> Rollout:
    """Completes every prompt with as many tokens of COMPLETION as its length modulo 3, plus one."""
    rows = len(prompts.ids)
    lengths = torch.tensor([len(ids) % 3 + 1 for ids in prompts.ids])
    mask = torch.arange(3) < lengths[:, None]
    ids = torch.tensor([COMPLETION] * rows) * mask
    hidden = torch.stack([torch.full((3, HIDDEN), float(len(ids))) for ids in prompts.ids])
    return Rollout(
        completion_ids=ids,
        completion_mask=mask,
        accepted_mask=mask,
        proposed_ids=ids,
        teacher_hidden=hidden,
        finish_reasons=torch.full((rows,), int(FinishReason.LENGTH)),
        num_proposed=lengths,
        source=Source.INTERLEAVED,
        num_rounds=1,
        num_draft_steps=3,
    )


def keyed_echo(prompts: Prompts, params: SamplingParams) -> Rollout:
    """Completes every prompt by a token made from its stream; odd ones ran to the limit."""
    rollout = echo(prompts, params)
    keys = (prompts.streams % 1000 + 1000)[:, None]
    return replace(
        rollout,
        completion_ids=keys * rollout.completion_mask,
        finish_reasons=torch.where(
            keys[:, 0] % 2 == 1, int(FinishReason.LENGTH), int(FinishReason.STOP)
        ),
    )


def source(share: float, **options: Any) -> RolloutSource:
    return RolloutSource(
        options.pop("sample", echo),
        Source.INTERLEAVED,
        PARAMS,
        share=lambda _progress: share,
        **{
            "max_new_tokens": 3,
            "seed": 5,
            "pad_token_id": 0,
            "pad_to_multiple_of": None,
            **options,
        },
    )


def batch(sample_ids: list[int]) -> dict[str, Any]:
    """Row i has a prompt of i % 4 + 1 tokens and a completion of two."""
    lengths = [i % 4 + 1 for i in sample_ids]
    rows = [torch.arange(10, 10 + length + 2) for length in lengths]
    return {
        **pad_rows(rows, lengths, 0, None),
        "prompt_lengths": torch.tensor(lengths),
        "sample_ids": torch.tensor(sample_ids),
    }


def tokens(completed: dict[str, Any], row: int) -> tuple[list[int], list[int]]:
    """Prompt and completion of a row, the latter by its labels."""
    kept = int(completed["attention_mask"][row].sum())
    start = int(completed["prompt_lengths"][row])
    labels = completed["labels"][row]
    assert (labels[:start] == IGNORE_INDEX).all() and (labels[kept:] == IGNORE_INDEX).all()
    return completed["input_ids"][row, :start].tolist(), labels[start:kept].tolist()


def rolled_out(completed: dict[str, Any]) -> Tensor:
    return torch.tensor(
        [tokens(completed, row)[1][0] == 90 for row in range(len(completed["sample_ids"]))]
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_are_rolled_out_or_kept_as_they_are(share: float) -> None:
    window = [batch([0, 1, 2]), batch([3, 4, 5, 6])]
    completed, metrics = source(share).complete(window, epoch=0, progress=0.0)
    count = 0
    for before, after in zip(window, completed, strict=True):
        states = after.get("stored_hidden")
        expected_states = []
        for row, new in enumerate(rolled_out(after).tolist()):
            prompt, completion = tokens(after, row)
            assert prompt == tokens(before, row)[0]
            expected = COMPLETION[: len(prompt) % 3 + 1] if new else tokens(before, row)[1]
            assert completion == expected
            if new:
                expected_states += [[float(len(prompt))] * HIDDEN] * len(completion)
                count += 1
        assert (states is None) == (not expected_states)
        if states is not None:
            assert states.states.tolist() == expected_states
            assert torch.equal(states.rows, rolled_out(after))
    assert metrics["rollout/share"] == (count, 7)
    assert {0.0: count == 0, 0.5: 0 < count < 7, 1.0: count == 7}[share]


def test_the_coin_belongs_to_the_sample() -> None:
    """The same verdict in any batch, so on any rank and after resuming; another in another epoch."""
    ids = list(range(200))
    whole = rolled_out(source(0.5).complete([batch(ids)], 0, 0.0)[0][0])
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    parts = [batch(shuffled[:70]), batch(shuffled[70:])]
    apart = torch.cat([rolled_out(part) for part in source(0.5).complete(parts, 0, 0.0)[0]])
    assert torch.equal(whole[shuffled], apart)
    later = rolled_out(source(0.5).complete([batch(ids)], 1, 0.0)[0][0])
    assert not torch.equal(whole, later)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_share_is_the_probability(share: float) -> None:
    """Hoeffding: a fair coin of this probability fails with probability below 1e-9."""
    count = 4000
    chosen = rolled_out(source(share).complete([batch(list(range(count)))], 3, 0.0)[0][0])
    bound = math.sqrt(math.log(2 / 1e-9) / (2 * count))
    assert abs(float(chosen.double().mean()) - share) < bound


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_several_rollouts_of_a_prompt_are_rows_of_their_own(share: float) -> None:
    """Rows of the data set stay single; the first rollout is the one there would have been alone."""
    ids = list(range(12))
    alone = source(share, sample=keyed_echo).complete([batch(ids)], 2, 0.0)[0][0]
    (several,), metrics = source(share, sample=keyed_echo, num_rollouts=3).complete(
        [batch(ids)], 2, 0.0
    )
    row = 0
    for sample, sampled in zip(ids, alone["rolled_out"].tolist(), strict=True):
        copies = 3 if sampled else 1
        group = [tokens(several, i) for i in range(row, row + copies)]
        assert several["sample_ids"][row : row + copies].tolist() == [sample] * copies
        assert several["rolled_out"][row : row + copies].tolist() == [sampled] * copies
        assert group[0] == tokens(alone, sample)
        assert len({tuple(prompt) for prompt, _ in group}) == 1
        assert len({tuple(completion) for _, completion in group}) == copies
        row += copies
    assert row == len(several["input_ids"])
    count = 3 * int(alone["rolled_out"].sum())
    assert metrics["rollout/share"] == (count, row)
    assert several["stored_hidden"].rows.tolist() == several["rolled_out"].tolist()


def test_streams_are_those_of_sample_and_rollout() -> None:
    (completed,), _ = source(1.0, num_rollouts=2).complete([batch([4, 7])], 3, 0.0)
    expected = [row_streams(5, 3, torch.tensor([i]), r).item() for i in (4, 7) for r in (0, 1)]
    assert completed["streams"].tolist() == expected


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_truncated_rollouts_can_be_left_out_of_the_loss(share: float) -> None:
    options = {"sample": keyed_echo, "num_rollouts": 2}
    (kept,), _ = source(share, **options).complete([batch(list(range(20)))], 0, 0.0)
    (masked,), _ = source(share, **options, mask_truncated=True).complete(
        [batch(list(range(20)))], 0, 0.0
    )
    assert torch.equal(kept["input_ids"], masked["input_ids"])
    stored, expected = kept["stored_hidden"], []
    lengths = (kept["labels"] != IGNORE_INDEX).sum(dim=1)[stored.rows]
    parts = iter(stored.states.split(lengths.tolist()))
    for row, sampled in enumerate(stored.rows.tolist()):
        before, after = kept["labels"][row], masked["labels"][row]
        states = next(parts) if sampled else None
        if sampled and int(before.max()) % 2 == 1:
            assert (after == IGNORE_INDEX).all() and not masked["stored_hidden"].rows[row]
            continue
        assert torch.equal(after, before)
        assert masked["stored_hidden"].rows[row] == sampled
        expected += [states] if sampled else []
    assert 0 < len(expected) < len(lengths)
    assert torch.equal(masked["stored_hidden"].states, torch.cat(expected))


def failing(broken: set[int]) -> Any:
    """`keyed_echo` that gives no numbers for prompts of some lengths, and says so one by one."""

    def sample(prompts: Prompts, params: SamplingParams) -> Rollout:
        bad = [row for row, ids in enumerate(prompts.ids) if len(ids) in broken]
        if bad:
            raise NonFiniteLogitsError(bad[:1])
        return keyed_echo(prompts, params)

    return sample


def test_skipped_rows_are_trained_on_nowhere_and_change_no_other() -> None:
    """Samples 1 and 5 have prompts of two tokens."""
    window = [batch([0, 1, 2]), batch([5, 3])]
    good, _ = source(1.0, sample=keyed_echo).complete(window, 0, 0.0)
    options = {"sample": failing({2}), "skip_non_finite": True}
    completed, metrics = source(1.0, **options).complete(window, 0, 0.0)
    assert metrics["loss/skipped_rows"] == (2, 0) and metrics["rollout/share"] == (3, 5)
    for batch_good, one, bad in zip(good, completed, (1, 0), strict=True):
        for row in range(len(one["labels"])):
            if row == bad:
                assert (one["labels"][row] == -100).all()
                assert int(one["attention_mask"][row].sum()) == 2  # the prompt is left
                continue
            for name in ("input_ids", "labels"):
                values = [x[name][row][x["attention_mask"][row].bool()] for x in (batch_good, one)]
                assert torch.equal(*values)


def test_rows_are_skipped_only_if_asked() -> None:
    said = r"sample\(s\) 1 \('tensor.*\) are not finite.*on_non_finite: skip"
    with pytest.raises(NonFiniteLogitsError, match=said):
        source(1.0, sample=failing({2})).complete([batch([0, 1, 5])], 0, 0.0)


def test_all_rows_of_a_rank_may_be_skipped() -> None:
    """Whether any are left elsewhere is the trainer's to ask."""
    window = [batch([0, 1, 2])]
    broken = {int(length) for length in window[0]["prompt_lengths"]}
    options = {"sample": failing(broken), "skip_non_finite": True}
    (completed,), metrics = source(1.0, **options).complete(window, 0, 0.0)
    assert metrics["loss/skipped_rows"] == (3, 0) and metrics["rollout/share"] == (0, 3)
    assert (completed["labels"] == IGNORE_INDEX).all()


def test_a_window_masked_as_a_whole_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def endless(prompts: Any, params: Any) -> Any:
        rollout = keyed_echo(prompts, params)
        return replace(
            rollout, finish_reasons=torch.full_like(rollout.finish_reasons, FinishReason.LENGTH)
        )

    masking = source(1.0, sample=endless, mask_truncated=True)
    for _ in range(2):
        masking.complete([batch([1, 2, 3])], 0, 0.0)
    assert caplog.text.count("all rollouts of a step ran to") == 1
