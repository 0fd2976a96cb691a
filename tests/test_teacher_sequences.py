"""Teacher sequences on disk: made once, resumed, shared by ranks, and never trusted unseen."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_skd.rollout.sampling import NonFiniteLogitsError
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source
from axolotl_skd.teacher_sequences import (
    MissingSequencesError,
    Request,
    StoredSequences,
    TeacherSequence,
    fingerprint,
    make_sequences,
    read_sequences,
    sequence_folder,
)
from tests.helpers import save_model

PARAMS = SamplingParams(3, 2, 1.0, 1.0, 1.0, 1.0, (2,))
REQUESTS = [Request(torch.tensor([5, 6, i]), stream=100 + i, sample=str(50 + i)) for i in range(7)]


@dataclass
class Teacher:
    """Completes a prompt that ends in i by i % 3 + 1 times its stream; may be interrupted."""

    asked: list[int] = field(default_factory=list)
    calls_until_interrupted: int = -1
    broken: tuple[int, ...] = ()  # streams for which it gives no numbers

    def __call__(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        if self.calls_until_interrupted == 0:
            raise KeyboardInterrupt
        self.calls_until_interrupted -= 1
        bad = [row for row, one in enumerate(prompts.streams.tolist()) if one in self.broken]
        if bad:
            raise NonFiniteLogitsError(bad)
        assert params is PARAMS and prompts.max_new_tokens.tolist() == [3] * len(prompts.ids)
        self.asked += prompts.streams.tolist()
        lengths = torch.tensor([int(ids[-1]) % 3 + 1 for ids in prompts.ids])
        mask = torch.arange(3) < lengths[:, None]
        return Rollout(
            completion_ids=prompts.streams[:, None] * mask,
            completion_mask=mask,
            accepted_mask=mask,
            proposed_ids=prompts.streams[:, None] * mask,
            teacher_hidden=None,
            finish_reasons=torch.where(lengths == 3, int(FinishReason.LENGTH), 0),
            num_proposed=lengths,
            source=Source.TEACHER,
            num_rounds=1,
            num_draft_steps=0,
        )


def make(
    folder: Path, teacher: Teacher, requests: list[Request] = REQUESTS, **ranks: Any
) -> dict[str, TeacherSequence]:
    return make_sequences(
        requests, folder, teacher, PARAMS, max_new_tokens=3, batch_size=2, **ranks
    )


EXPECTED = {
    request.key: TeacherSequence(
        (request.stream,) * (i % 3 + 1), FinishReason.LENGTH if i % 3 == 2 else FinishReason.STOP
    )
    for i, request in enumerate(REQUESTS)
}


def test_sequences_are_made_once(tmp_path: Path) -> None:
    first, second = Teacher(), Teacher()
    assert make(tmp_path, first) == EXPECTED
    assert first.asked == [request.stream for request in REQUESTS]
    assert make(tmp_path, second) == EXPECTED
    assert second.asked == []


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Teacher(calls_until_interrupted=2))
    again = Teacher()
    assert make(tmp_path, again) == EXPECTED
    assert again.asked == [104, 105, 106]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_what_is_corrupt_is_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, Teacher())
    victim = next(path for path in tmp_path.iterdir() if b"[[102" in path.read_bytes())
    content = victim.read_bytes()
    flipped = content.replace(b"102, 102", b"102, 103")
    assert flipped != content
    victim.write_bytes({"flip": flipped, "cut": content[:-9], "empty": b""}[damage])
    again = Teacher()
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path, again) == EXPECTED
    assert again.asked == [102, 103]
    assert f"{victim} is corrupt" in caplog.text
    assert read_sequences(tmp_path).keys() == {request.key for request in REQUESTS}


def test_other_prompts_and_streams_are_other_sequences(tmp_path: Path) -> None:
    """An id column can survive while its prompt is edited."""
    make(tmp_path, Teacher())
    edited = Request(torch.tensor([5, 7, 1]), stream=101, sample="51")
    another = Request(REQUESTS[2].prompt, stream=300, sample="52")
    teacher = Teacher()
    make(tmp_path, teacher, [edited, another, REQUESTS[3]])
    assert teacher.asked == [101, 300]


def test_a_stream_that_two_prompts_share_is_two_sequences(tmp_path: Path) -> None:
    """As where an id column is not unique."""
    twins = [Request(torch.tensor(ids), stream=300, sample="5") for ids in ([5, 1], [5, 2])]
    made = make(tmp_path, Teacher(), twins)
    assert made.keys() == {twin.key for twin in twins} and len(made) == 2


def test_only_the_first_rank_removes_what_is_corrupt(tmp_path: Path) -> None:
    make(tmp_path, Teacher())
    victim = next(path for path in tmp_path.iterdir() if b"[[102" in path.read_bytes())
    content = victim.read_bytes()
    victim.write_bytes(b"")
    # By the time that the others read, the first rank has removed it.
    make(tmp_path, Teacher(), rank=1, num_ranks=2, barrier=lambda: victim.write_bytes(content))
    assert victim.exists()


def test_ranks_make_their_shares_and_wait(tmp_path: Path) -> None:
    """Rank 1 works while rank 0 waits; part of the shares was there before, from one rank alone."""
    make(tmp_path, Teacher(), REQUESTS[:3])
    teachers = [Teacher(), Teacher()]
    others: list[dict[str, TeacherSequence]] = []
    barriers = []

    def barrier() -> None:
        barriers.append(None)
        if len(barriers) == 2:  # the first one comes before anybody reads
            others.append(make(tmp_path, teachers[1], rank=1, num_ranks=2))

    assert make(tmp_path, teachers[0], rank=0, num_ranks=2, barrier=barrier) == EXPECTED
    assert others == [EXPECTED]
    assert [teacher.asked for teacher in teachers] == [[104, 106], [103, 105]]


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingSequencesError, match="3 of 7 .* folder that every rank can read"):
        make(tmp_path, Teacher(), rank=0, num_ranks=2)


def test_every_setting_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [
        sequence_folder(tmp_path, settings)
        for settings in ({"teacher": "a", "seed": 1}, {"seed": 1, "teacher": "a"}, {"seed": 2})
    ]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].is_relative_to(tmp_path)
    assert '"teacher": "a"' in (folders[0] / "settings.json").read_text()


def test_packed_weights_are_part_of_a_fingerprint(tmp_path: Path) -> None:
    """Kernels of pre-quantised checkpoints keep theirs in buffers."""
    model = save_model(tmp_path)
    plain = fingerprint(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.register_buffer("qweight", torch.arange(8))
    packed = fingerprint(model)
    layer.qweight.neg_()
    assert len({plain, packed, fingerprint(model)}) == 3


def test_a_fingerprint_is_that_of_weights_and_configuration(tmp_path: Path) -> None:
    models = [save_model(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert fingerprint(models[0]) == fingerprint(models[1]) != fingerprint(models[2])
    models[1].config.rms_norm_eps = 0.1
    assert fingerprint(models[0]) != fingerprint(models[1])


def test_stored_sequences_come_as_a_rollout() -> None:
    asked = [REQUESTS[2], REQUESTS[0], REQUESTS[2]]
    streams = torch.tensor([request.stream for request in asked])
    ids = tuple(request.prompt for request in asked)
    prompts = Prompts(ids, streams, torch.full((3,), 3))
    rollout = StoredSequences(EXPECTED)(prompts, PARAMS)
    assert [row.tolist() for row in rollout.unpadded()] == [[102] * 3, [100], [102] * 3]
    assert rollout.finish_reasons.tolist() == [1, 0, 1]
    assert rollout.source is Source.TEACHER and not rollout.accepted_mask.any()
    assert rollout.select(1, 2).completion_ids.tolist() == [[100]]


def test_rows_without_numbers_stop_or_are_noted(tmp_path: Path) -> None:
    teacher = Teacher(broken=(101, 105))
    with pytest.raises(NonFiniteLogitsError, match=r"sample\(s\) 51 are not finite"):
        make(tmp_path, teacher)
    sequences = make(tmp_path, teacher, skip_non_finite=True)
    broken = [REQUESTS[1].key, REQUESTS[5].key]
    assert [key for key, row in sequences.items() if not row.ids] == broken
    (tmp_path / "sound").mkdir()
    sound = make(tmp_path / "sound", Teacher())
    assert all(sequences[key] == row for key, row in sound.items() if key not in broken)
    teacher.asked.clear()
    assert make(tmp_path, teacher, skip_non_finite=True) == sequences and not teacher.asked

    asked = [REQUESTS[index] for index in (0, 1, 2)]
    streams = torch.tensor([request.stream for request in asked])
    prompts = Prompts(tuple(request.prompt for request in asked), streams, torch.tensor([3] * 3))
    with pytest.raises(NonFiniteLogitsError) as error:  # for `on_non_finite` of the run to judge
        StoredSequences(sequences)(prompts, PARAMS)
    assert error.value.rows == [1]

    # Asked to stop, a run tries them again: they are named, or mended.
    with pytest.raises(NonFiniteLogitsError, match=r"sample\(s\) 51, 55 are not finite"):
        make(tmp_path, teacher)
    assert make(tmp_path, Teacher()) == sound
    assert make(tmp_path, teacher, skip_non_finite=True) == sound


def test_a_batch_may_be_wholly_without_numbers(tmp_path: Path) -> None:
    sequences = make(tmp_path, Teacher(broken=tuple(range(100, 107))), skip_non_finite=True)
    assert len(sequences) == 7 and not any(row.ids for row in sequences.values())


def test_ctrl_c_says_what_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        make(tmp_path, Teacher(calls_until_interrupted=1))
    assert f"kept in {tmp_path}" in caplog.text and read_sequences(tmp_path)
