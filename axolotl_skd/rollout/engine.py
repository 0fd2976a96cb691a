"""Speculative rollouts for a ragged batch: propose, verify, replace (SKD paper, Algorithm 1).

Per round every live row feeds its pending token (committed, not yet in the caches) and up to G - 1
proposals: G student forwards of one token, one teacher forward of G tokens. The teacher keeps the
proposals within its top K, the first other one is replaced by a sample of the teacher's own, what
follows is discarded; when all are kept no bonus token is taken. Rows that end leave the batch.

The teacher's hidden states of the verification *are* the distillation targets of the committed
tokens, since its input there is the committed prefix: no second teacher forward is needed.

Legend: B rows, R live rows, G draft tokens, T longest completion, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from axolotl_skd.rollout.lm import LanguageModel
from axolotl_skd.rollout.sampling import (
    NonFiniteLogitsError,
    Role,
    keyed_uniform,
    sample_top_p,
    top_k_accept_mask,
)
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, SamplingParams, Source


class RolloutEngine:
    """Samples completions from a student, a teacher, or both interleaved.

    The models must be in evaluation mode and gradients off (`lm.rollout_mode`).
    """

    def __init__(self, student: LanguageModel, teacher: LanguageModel | None = None) -> None:
        self.student = student
        self.teacher = teacher

    def interleave(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """SKD: the student proposes, the teacher verifies and replaces."""
        rows = _Rows(prompts, params.stop_token_ids, self.student.device)
        student_cache = _prefill(self.student, prompts, rows)
        teacher_cache = _prefill(self._require_teacher(), prompts, rows)
        while rows.any_live:
            with rows.naming_rows():
                self._round(rows, student_cache, teacher_cache, params)
        return rows.rollout(Source.INTERLEAVED)

    def sample_student(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """On-policy: every token is the student's own."""
        return self._sample(self.student, Role.STUDENT, prompts, params)

    def sample_teacher(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """Sequence-level KD: every token is the teacher's."""
        return self._sample(self._require_teacher(), Role.TEACHER, prompts, params)

    def _round(
        self, rows: _Rows, student_cache: Any, teacher_cache: Any, params: SamplingParams
    ) -> None:
        """Propose, verify, replace, once for all live rows."""
        teacher = self._require_teacher()
        num_draft = min(params.num_draft_tokens, rows.longest_remaining)
        fed, proposals = self._propose(rows, student_cache, num_draft, params)
        # Verification happens where the teacher lives; only token ids travel.
        positions = rows.positions(num_draft).to(teacher.device)
        hidden = teacher.forward(
            fed.to(teacher.device), positions, teacher_cache, rows.longest + num_draft - 1
        )
        tokens, num_accepted = _verify(
            teacher.logits(hidden), proposals, rows.uniforms(num_draft, Role.TEACHER), params
        )
        kept = rows.commit(
            tokens,
            limit=(num_accepted + 1).clamp(max=num_draft),
            proposals=proposals,
            num_accepted=num_accepted,
            hidden=hidden,
        )
        if kept is not None:
            student_cache.keep_rows(kept)
            teacher_cache.keep_rows(kept.to(teacher.device))

    def _propose(
        self, rows: _Rows, cache: Any, num_draft: int, params: SamplingParams
    ) -> tuple[Tensor, Tensor]:
        """The student's proposals and what was fed to get them: both int64 [R, G]."""
        positions = rows.positions(num_draft)
        uniforms = rows.uniforms(num_draft, Role.STUDENT)
        tokens = [rows.pending]
        for i in range(num_draft):
            hidden = self.student.forward(
                tokens[-1][:, None], positions[:, i : i + 1], cache, rows.longest + i
            )
            logits = self.student.logits(hidden[:, -1])
            tokens.append(
                sample_top_p(
                    logits, params.student_temperature, params.student_top_p, uniforms[:, i]
                )
            )
        return torch.stack(tokens[:-1], dim=1), torch.stack(tokens[1:], dim=1)

    def _sample(
        self, lm: LanguageModel, role: Role, prompts: Prompts, params: SamplingParams
    ) -> Rollout:
        """Plain sampling from one model, a token per row and round."""
        by_student = role is Role.STUDENT
        temperature = params.student_temperature if by_student else params.teacher_temperature
        top_p = params.student_top_p if by_student else params.teacher_top_p
        rows = _Rows(prompts, params.stop_token_ids, lm.device)
        cache = _prefill(lm, prompts, rows)
        while rows.any_live:
            hidden = lm.forward(rows.pending[:, None], rows.positions(1), cache, rows.longest)
            uniforms = rows.uniforms(1, role)[:, 0]
            with rows.naming_rows():
                tokens = sample_top_p(lm.logits(hidden[:, -1]), temperature, top_p, uniforms)
            tokens = tokens[:, None]
            one = torch.ones_like(rows.pending)
            kept = rows.commit(
                tokens,
                limit=one,
                proposals=tokens if by_student else None,
                num_accepted=one if by_student else torch.zeros_like(one),
            )
            if kept is not None:
                cache.keep_rows(kept)
        return rows.rollout(Source.STUDENT if by_student else Source.TEACHER)

    def _require_teacher(self) -> LanguageModel:
        if self.teacher is None:
            raise ValueError("this rollout needs a teacher, and the engine was built without one")
        return self.teacher


def _verify(
    logits: Tensor, proposals: Tensor, uniforms: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """Keep the proposals up to the first outside the teacher's top K, replace that one.

    Args:
        logits: raw teacher logits [R, G, V], on the teacher's device.
        proposals: int64 [R, G].
        uniforms: the teacher's random numbers for these positions, float64 [R, G].

    Returns:
        tokens int64 [R, G] (meaningless after the replacement), number accepted int64 [R], both on
        the device of `proposals`.
    """
    num_draft = proposals.shape[1]
    drafts = proposals.to(logits.device)
    accepted = top_k_accept_mask(logits, drafts, params.teacher_top_k)
    num_accepted = accepted.long().cumprod(dim=1).sum(dim=1)
    # Where everything was accepted the last index is sampled in vain and not used.
    index = num_accepted.clamp(max=num_draft - 1)[:, None]
    replacements = sample_top_p(
        logits.take_along_dim(index[:, :, None], dim=1)[:, 0],
        params.teacher_temperature,
        params.teacher_top_p,
        uniforms.to(logits.device).gather(1, index)[:, 0],
    )
    offsets = torch.arange(num_draft, device=logits.device)
    tokens = torch.where(offsets == num_accepted[:, None], replacements[:, None], drafts)
    return tokens.to(proposals.device), num_accepted.to(proposals.device)


def _prefill(lm: LanguageModel, prompts: Prompts, rows: _Rows) -> Any:
    """A cache that holds every prompt but its last token, which stays pending."""
    cache = lm.new_cache(rows.num_slots)
    width = max(len(row) for row in prompts.ids) - 1
    if width > 0:
        # Right-padded: pads sit in later slots, invisible until overwritten by the real token.
        ids = torch.nn.utils.rnn.pad_sequence(
            [row[:-1] for row in prompts.ids], batch_first=True
        ).to(lm.device)
        positions = torch.arange(width, device=lm.device).expand(len(ids), -1)
        lm.forward(ids, positions, cache, width)
    return cache


class _Rows:
    """The rows of a rollout: state of those in flight, results of all.

    Results carry one spare column at the end, where tokens that are not committed are written.
    """

    def __init__(self, prompts: Prompts, stop_ids: tuple[int, ...], device: torch.device) -> None:
        num_rows = len(prompts.ids)
        self.max_new = prompts.max_new_tokens.to(device)
        self.width = int(self.max_new.max())
        # State of the live rows, compacted together; `live` maps them to rows of the results.
        self.live = torch.arange(num_rows, device=device)
        self.streams = prompts.streams.to(device)
        self.pending = torch.stack([row[-1] for row in prompts.ids]).to(device)
        self.prompt_lengths = torch.tensor([len(row) for row in prompts.ids], device=device)
        self.generated = torch.zeros_like(self.live)
        self.num_slots = int((self.prompt_lengths + self.max_new).max())
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self._update_extent()
        # Results.
        self.completion_ids = torch.zeros(num_rows, self.width + 1, dtype=torch.long, device=device)
        self.proposed_ids = torch.full_like(self.completion_ids, -1)
        self.accepted = torch.zeros_like(self.completion_ids, dtype=torch.bool)
        self.hidden: Tensor | None = None
        self.lengths = torch.zeros_like(self.live)
        self.num_proposed = torch.zeros_like(self.live)
        self.finish_reasons = torch.full_like(self.live, int(FinishReason.LENGTH))
        self.num_rounds = 0

    @property
    def any_live(self) -> bool:
        return len(self.live) > 0

    @contextmanager
    def naming_rows(self) -> Iterator[None]:
        """Failures name rows of the rollout, not of what is left of it."""
        live = self.live
        try:
            yield
        except NonFiniteLogitsError as error:
            raise NonFiniteLogitsError(live[error.rows].tolist()) from error

    def positions(self, num_tokens: int) -> Tensor:
        """Where the pending token and its `num_tokens` - 1 successors go, int64 [R, num_tokens].

        Clamped to the last position of the row: what would lie past it predicts tokens that are
        never committed, and no model is asked for a position that it does not have.
        """
        first = self.prompt_lengths + self.generated - 1
        last = self.prompt_lengths + self.max_new - 1
        offsets = torch.arange(num_tokens, device=first.device)
        return torch.minimum(first[:, None] + offsets, last[:, None])

    def uniforms(self, num_tokens: int, role: Role) -> Tensor:
        """Random numbers of the next tokens, keyed by their positions, float64 [R, num_tokens]."""
        offsets = torch.arange(num_tokens, device=self.live.device)
        positions = (self.prompt_lengths + self.generated)[:, None] + offsets
        return keyed_uniform(self.streams[:, None], positions, role)

    def commit(
        self,
        tokens: Tensor,
        limit: Tensor,
        proposals: Tensor | None,
        num_accepted: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor | None:
        """Append a round's tokens: at most `limit`, up to the row's length or first stop token.

        Args:
            tokens: int64 [R, G].
            limit: int64 [R], how many of them stand.
            proposals: int64 [R, G], what the student had proposed, None if it did not.
            num_accepted: int64 [R], how many of them are the student's own.
            hidden: [R, G, H], the teacher's states that predict them.

        Returns:
            None while all rows go on, else the indices of those that do, int64 [R'].
        """
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        limit = torch.minimum(limit, self.max_new - self.generated)
        stops = torch.isin(tokens, self._stop_ids) & (offsets < limit[:, None])
        stopped = stops.any(dim=1)
        count = torch.where(stopped, stops.int().argmax(dim=1) + 1, limit)

        committed = offsets < count[:, None]
        rows = self.live[:, None]
        columns = torch.where(committed, self.generated[:, None] + offsets, self.width)
        self.completion_ids[rows, columns] = tokens
        self.accepted[rows, columns] = offsets < num_accepted[:, None]
        if proposals is not None:
            self.proposed_ids[rows, columns] = proposals
            self.num_proposed[self.live] += tokens.shape[1]
        if hidden is not None:
            if self.hidden is None:
                shape = (len(self.lengths), self.width + 1, hidden.shape[-1])
                self.hidden = hidden.new_zeros(shape)
            self.hidden[rows.to(hidden.device), columns.to(hidden.device)] = hidden

        self.generated = self.generated + count
        self.pending = tokens.gather(1, count[:, None] - 1)[:, 0]
        self.lengths[self.live] = self.generated
        self.finish_reasons[self.live[stopped]] = int(FinishReason.STOP)
        self.num_rounds += 1
        return self._drop_finished(stopped | (self.generated >= self.max_new))

    def _drop_finished(self, finished: Tensor) -> Tensor | None:
        kept = None
        if bool(finished.any()):
            kept = (~finished).nonzero()[:, 0]
            for name in ("live", "streams", "pending", "prompt_lengths", "generated", "max_new"):
                setattr(self, name, getattr(self, name)[kept])
        self._update_extent()
        return kept

    def _update_extent(self) -> None:
        """Host-side bounds of the next round: longest row and most tokens still to come."""
        if self.any_live:
            lengths = self.prompt_lengths + self.generated
            extent = torch.stack([lengths.max(), (self.max_new - self.generated).max()])
            self.longest, self.longest_remaining = extent.tolist()

    def rollout(self, source: Source) -> Rollout:
        """The finished record, trimmed to the longest completion."""
        width = int(self.lengths.max())
        offsets = torch.arange(width, device=self.lengths.device)
        mask = offsets < self.lengths[:, None]
        return Rollout(
            completion_ids=self.completion_ids[:, :width] * mask,
            completion_mask=mask,
            accepted_mask=self.accepted[:, :width] & mask,
            proposed_ids=self.proposed_ids[:, :width],
            teacher_hidden=None if self.hidden is None else self.hidden[:, :width],
            finish_reasons=self.finish_reasons,
            num_proposed=self.num_proposed,
            source=source,
            num_rounds=self.num_rounds,
        )
