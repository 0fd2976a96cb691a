"""Records that go into and come out of a rollout.

Legend: B rows, P_b prompt length of row b, T longest completion, H hidden size of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Literal

from torch import Tensor

AUTO = "auto"
"""The draft length that is fastest at the time."""


class Source(str, Enum):
    """Where the tokens of a completion come from."""

    DATASET = "dataset"
    STUDENT = "student"
    TEACHER = "teacher"
    INTERLEAVED = "interleaved"


class FinishReason(IntEnum):
    """Why a row ended."""

    STOP = 0  # a token of the stop set, or one that completes a stop string: part of the completion
    LENGTH = 1  # it reached its `max_new_tokens`


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How both models are sampled (SKD paper, Algorithm 1 and appendix C).

    Temperatures divide the logits; `*_top_p` keeps the smallest set of tokens of at least that mass;
    `teacher_top_k` is K of the acceptance test, on raw logits; `num_draft_tokens` is G, or `AUTO`.
    `acceptance_top_p` and `acceptance_min_p` belong to the rules of these names. A rejected proposal is
    replaced by a `sample` of the teacher's or by its `argmax`; where a whole proposal is accepted, a
    `bonus_token` of the same kind may follow it, which makes tokens depend on G.
    """

    num_draft_tokens: int | Literal["auto"]
    teacher_top_k: int
    student_temperature: float
    student_top_p: float
    teacher_temperature: float
    teacher_top_p: float
    stop_token_ids: tuple[int, ...]
    acceptance_top_p: float | None = None
    acceptance_min_p: float | None = None
    replacement: Literal["sample", "argmax"] = "sample"
    bonus_token: bool = False

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "teacher_top_k"):
            if getattr(self, name) != AUTO and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("student_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("student_top_p", "teacher_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if self.bonus_token and self.num_draft_tokens == AUTO:
            raise ValueError("a bonus token depends on the draft length, which must then be fixed")


@dataclass(frozen=True, slots=True)
class Prompts:
    """A ragged batch of prompts.

    Attributes:
        ids: B int64 tensors of shape [P_b], each of at least one token, without padding.
        streams: int64 [B], the random stream of each row (`sampling.row_streams`).
        max_new_tokens: int64 [B], longest completion of each row, at least 1.
    """

    ids: tuple[Tensor, ...]
    streams: Tensor
    max_new_tokens: Tensor

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("a rollout needs at least one prompt")
        if not len(self.ids) == len(self.streams) == len(self.max_new_tokens):
            raise ValueError(
                f"{len(self.ids)} prompts, {len(self.streams)} streams and "
                f"{len(self.max_new_tokens)} lengths: one of each per row is needed"
            )
        if any(len(row) == 0 for row in self.ids):
            raise ValueError("a prompt without tokens cannot be continued")
        if int(self.max_new_tokens.min()) < 1:
            raise ValueError("max_new_tokens must be at least 1 in every row")


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions as they were sampled; ids are trained on as they are, never decoded in between.

    Attributes:
        completion_ids: int64 [B, T], right-padded with 0.
        completion_mask: bool [B, T], True on the tokens of the completion, the stop token included.
        accepted_mask: bool [B, T], True where the student's own proposal was kept. Always False when
            the teacher alone sampled, always `completion_mask` when the student alone did.
        proposed_ids: int64 [B, T], what the student had proposed there, -1 where it proposed nothing
            (a bonus token, or the teacher alone).
        teacher_hidden: [B, T, H], the teacher's last hidden state that predicts completion token t,
            kept from verification and on the teacher's device, a bonus token's too; None without
            verification.
        finish_reasons: int64 [B], values of `FinishReason`.
        num_proposed: int64 [B], student proposals paid for, wasted ones included; 0 without proposals.
        source: which model(s) sampled.
        num_rounds: rounds of the batch as a whole.
        num_draft_steps: student steps of all rounds, G in each; 0 without a verification.
    """

    completion_ids: Tensor
    completion_mask: Tensor
    accepted_mask: Tensor
    proposed_ids: Tensor
    teacher_hidden: Tensor | None
    finish_reasons: Tensor
    num_proposed: Tensor
    source: Source
    num_rounds: int
    num_draft_steps: int

    @property
    def completion_lengths(self) -> Tensor:
        """int64 [B]"""
        return self.completion_mask.sum(dim=1)

    def unpadded(self) -> list[Tensor]:
        """Completion ids without padding: B tensors, int64 [T_b]."""
        lengths = self.completion_lengths.tolist()
        return [ids[:length] for ids, length in zip(self.completion_ids, lengths, strict=True)]

    def select(self, start: int, stop: int) -> Rollout:
        """The rows [start, stop), trimmed to their own longest completion."""
        rows = slice(start, stop)
        width = int(self.completion_lengths[rows].max())
        hidden = self.teacher_hidden
        return Rollout(
            completion_ids=self.completion_ids[rows, :width],
            completion_mask=self.completion_mask[rows, :width],
            accepted_mask=self.accepted_mask[rows, :width],
            proposed_ids=self.proposed_ids[rows, :width],
            teacher_hidden=None if hidden is None else hidden[rows, :width],
            finish_reasons=self.finish_reasons[rows],
            num_proposed=self.num_proposed[rows],
            source=self.source,
            num_rounds=self.num_rounds,
            num_draft_steps=self.num_draft_steps,
        )
