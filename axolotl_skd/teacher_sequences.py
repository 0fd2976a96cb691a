"""The teacher's own completions (`seqkd`): made once before training, kept on disk, read from there.

A folder belongs to a teacher and the settings of its sampling; an entry in it to a prompt and a random
stream, so to a row of the data and one of its rollouts. Entries come in files named by the digest of
their contents: one that does not match is dropped and made again. Files appear whole or not at all, so
an interrupted run goes on where it was.

Legend: B rows, T longest completion.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from tqdm.auto import tqdm

from axolotl_skd.held_weights import held_weights
from axolotl_skd.rollout.sampling import NonFiniteLogitsError
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source
from axolotl_skd.sound_rows import sample_sound_rows

LOG = get_logger(__name__)

# Numbers of each weight matrix that identify a model.
_FINGERPRINT_NUMBERS = 64
_SUFFIX = ".sequences"


class MissingSequencesError(RuntimeError):
    """Sequences that should have been made by now."""


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence that is wanted.

    Attributes:
        prompt: int64 [P].
        stream: its random stream (`sampling.row_streams`).
        sample: what the data set's row is called, for people.
    """

    prompt: Tensor
    stream: int
    sample: str

    @property
    def key(self) -> str:
        return _key(self.prompt, self.stream)


@dataclass(frozen=True, slots=True)
class TeacherSequence:
    """A completion: its token ids, and why it ended. Without tokens: none could be sampled."""

    ids: tuple[int, ...]
    finish: FinishReason


def fingerprint(
    model: nn.Module,
    whole: Callable[[nn.Parameter], AbstractContextManager[Tensor]] = nullcontext,
) -> str:
    """What identifies a teacher wherever it lies: its configuration and part of every weight.

    Args:
        model: the teacher.
        whole: a weight in one piece (`sharding.AtHand.whole`).
    """
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in held_weights(model).items():
        with whole(weight) as entire:
            flat = entire.detach().flatten()
            some = flat[:: max(1, len(flat) // _FINGERPRINT_NUMBERS)].clone()
        digest.update(name.encode() + some.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:32]


def sequence_folder(prepared_path: Path, settings: Mapping[str, Any]) -> Path:
    """Where sequences made with these settings (JSON) lie; they are written there for people too."""
    text = json.dumps(settings, sort_keys=True, indent=1)
    folder = prepared_path / "teacher_sequences" / _digest(text.encode())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(text, encoding="utf-8")
    return folder


def remove_corrupt(folder: Path) -> None:
    """Remove files whose contents are not what was written, and say so."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if _digest(path.read_bytes()) != path.stem:
            LOG.warning("%s is corrupt: its sequences are made again.", path)
            path.unlink()


def read_sequences(folder: Path) -> dict[str, TeacherSequence]:
    """All entries by key."""
    found = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        for key, (ids, finish) in json.loads(path.read_bytes()).items():
            if ids or key not in found:  # made at last, after it could not be sampled
                found[key] = TeacherSequence(tuple(ids), FinishReason(finish))
    return found


def write_sequences(folder: Path, sequences: Mapping[str, TeacherSequence]) -> Path:
    """A file of entries, whole or not at all."""
    entries = {key: [one.ids, int(one.finish)] for key, one in sequences.items()}
    content = json.dumps(entries).encode()
    path = folder / f"{_digest(content)}{_SUFFIX}"
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
    return path


def make_sequences(
    requests: Sequence[Request],
    folder: Path,
    sample: Callable[[Prompts, SamplingParams], Rollout],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    batch_size: int,
    skip_non_finite: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
    barrier: Callable[[], None] = lambda: None,
    asking: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, TeacherSequence]:
    """Read what is there, make what is not: each rank its share, all wait for all.

    Args:
        requests: of the whole data set, in the same order on all ranks.
        folder: see `sequence_folder`; one that all ranks see.
        sample: the engine's sampler.
        params: how to sample.
        max_new_tokens: longest completion.
        batch_size: sequences that are made, and kept, at a time.
        skip_non_finite: where nothing can be sampled, keep that. Else it is tried again and stops.
        rank, num_ranks: of this process.
        barrier: waits for all ranks.
        asking: entered once, around all that is sampled (`sharding.AtHand.asking`).

    Returns:
        the sequences by `Request.key`.

    Raises:
        MissingSequencesError: another rank's share is not in the folder.
        rollout.sampling.NonFiniteLogitsError: nothing can be sampled for a row.
    """
    if rank == 0:  # alone, and before anybody writes: a file made again has the same name
        remove_corrupt(folder)
    barrier()
    known = {key: one for key, one in read_sequences(folder).items() if one.ids or skip_non_finite}
    # By position in the whole list: what is known may differ while other ranks already write.
    mine = {request.key: request for request in requests[rank::num_ranks]}
    wanted = [request for key, request in mine.items() if key not in known]
    if wanted and len(wanted) < len(mine):
        LOG.info("%d of %d teacher sequences are there already", len(mine) - len(wanted), len(mine))
    try:
        progress = tqdm(
            total=len(mine),
            initial=len(mine) - len(wanted),
            desc="teacher sequences",
            disable=rank > 0 or not wanted,
        )
        with progress, asking():
            for start in range(0, len(wanted), batch_size):
                group = wanted[start : start + batch_size]
                made = _made(group, sample, params, max_new_tokens, skip_non_finite)
                write_sequences(folder, made)
                progress.update(len(group))
    except KeyboardInterrupt:
        LOG.warning(
            "interrupted: what is made so far is kept in %s, and the same command goes on from there.",
            folder,
        )
        raise
    barrier()
    known = read_sequences(folder)
    missing = sum(request.key not in known for request in requests)
    if missing:
        raise MissingSequencesError(
            f"{missing} of {len(requests)} teacher sequences are not in {folder}, although all ranks "
            "have made their share. Set dataset_prepared_path to a folder that every rank can read."
        )
    return {request.key: known[request.key] for request in requests}


def _made(
    group: Sequence[Request],
    sample: Callable[[Prompts, SamplingParams], Rollout],
    params: SamplingParams,
    max_new_tokens: int,
    skip: bool,
) -> dict[str, TeacherSequence]:
    streams = torch.tensor([request.stream for request in group])
    prompts = Prompts(
        tuple(request.prompt for request in group),
        streams,
        torch.full_like(streams, max_new_tokens),
    )
    rollout, sound = sample_sound_rows(
        sample,
        prompts,
        params,
        name=lambda row: group[row].sample,
        skip=skip,
    )
    rows = iter(())
    if rollout is not None:
        rows = iter(zip(rollout.unpadded(), rollout.finish_reasons.tolist(), strict=True))
    made = {}
    for request, is_sound in zip(group, sound.tolist(), strict=True):
        ids, finish = next(rows) if is_sound else (streams[:0], FinishReason.LENGTH)
        made[request.key] = TeacherSequence(tuple(ids.tolist()), FinishReason(finish))
    return made


class StoredSequences:
    """A sampler that looks its completions up."""

    def __init__(self, by_key: Mapping[str, TeacherSequence]) -> None:
        """
        Args:
            by_key: the sequences by `Request.key`.
        """
        self._by_key = by_key

    def __call__(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """The completions of these streams, as if the teacher had just sampled them.

        Raises:
            rollout.sampling.NonFiniteLogitsError: where it could not.
        """
        device = prompts.streams.device
        asked = zip(prompts.ids, prompts.streams.tolist(), strict=True)
        rows = [self._by_key[_key(ids.cpu(), stream)] for ids, stream in asked]
        empty = [index for index, row in enumerate(rows) if not row.ids]
        if empty:
            raise NonFiniteLogitsError(empty, "teacher")
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.ids, device=device) for row in rows], batch_first=True
        )
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        return Rollout(
            completion_ids=ids,
            completion_mask=mask,
            accepted_mask=torch.zeros_like(mask),
            proposed_ids=torch.full_like(ids, -1),
            teacher_hidden=None,
            finish_reasons=torch.tensor([int(row.finish) for row in rows], device=device),
            num_proposed=torch.zeros_like(lengths),
            source=Source.TEACHER,
            num_rounds=0,
            num_draft_steps=0,
        )


def _key(prompt: Tensor, stream: int) -> str:
    return f"{stream}:{_digest(prompt.numpy().tobytes())}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
