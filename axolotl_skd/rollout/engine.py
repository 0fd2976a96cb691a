"""Speculative rollouts for a ragged batch: propose, verify, replace (SKD paper, Algorithm 1).

Per round every row in flight feeds its pending token (committed, not yet in the caches) and up to G - 1
proposals: G student forwards of one token, one teacher forward of G tokens. The teacher keeps the
proposals within its top K (or by another rule of `acceptance`), the first other one is replaced by a
sample of the teacher's own, what follows is discarded; when all are kept no bonus token is taken,
unless asked for. A row that ends gives its place to one that waits, or leaves the batch.

The teacher's hidden states of the verification *are* the distillation targets of the committed
tokens, since its input there is the committed prefix: no second teacher forward is needed.

The host waits for the device once a round. Samples are taken from a shortlist without asking whether
it was long enough; if the round's report says that it was not, the round is done again with patience.
Nothing is to be undone for that: all that the models wrote lies in slots that are written anew.

Legend: R rows in flight, G draft tokens, W = G + 1 with a bonus token, else G, V vocabulary, H hidden
size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_skd.rollout.acceptance import (
    AcceptanceRule,
    RatioTest,
    Replacement,
    accept_top_k,
    teacher_replacement,
)
from axolotl_skd.rollout.draft_length import (
    AdaptiveDraftLength,
    DraftLength,
    FixedDraftLength,
    RoundReport,
)
from axolotl_skd.rollout.flight import Committed, Flight, Proposal, group_prompts
from axolotl_skd.rollout.haste import Haste, RoundSampler
from axolotl_skd.rollout.lm import LanguageModel
from axolotl_skd.rollout.sampling import (
    NonFiniteLogitsError,
    Role,
)
from axolotl_skd.rollout.stop_strings import StopStrings
from axolotl_skd.rollout.stopwatch import Stopwatch
from axolotl_skd.rollout.types import AUTO, Prompts, Rollout, SamplingParams, Source

# Teacher logits that exist at one time: 2^27 floats = 512 MiB.
VERIFIED_ELEMENTS = 2**27

# Prompt tokens of one forward, padding included: plenty for any device, and a bound on its memory.
PREFILL_TOKENS = 2**14


@dataclass(frozen=True, slots=True)
class _Draft:
    """What the student did in a round.

    Attributes:
        fed: int64 [R, W], what it was given, the pending token first.
        tokens: int64 [R, G], what it proposes.
        states: its states [R, G, H] that predict them, for a `RatioTest` only.
        probs: float64 [R, G], its probabilities of them, for a `RatioTest` only.
    """

    fed: Tensor
    tokens: Tensor
    states: Tensor | None
    probs: Tensor | None


class RolloutEngine:
    """Samples completions from a student, a teacher, or both interleaved.

    The models must be in evaluation mode and gradients off (`lm.rollout_mode`). What the adaptive draft
    length has learned stays with the engine.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel | None = None,
        *,
        accept: AcceptanceRule | RatioTest = accept_top_k,
        stop_strings: StopStrings | None = None,
        rollout_batch_size: int | None = None,
        fixed_shapes: bool = False,
        patient: bool | None = None,
    ) -> None:
        """
        Args:
            student, teacher: the models.
            accept: which proposals the teacher keeps.
            stop_strings: texts that end a completion, beside the stop tokens.
            rollout_batch_size: most rows in flight, default all.
            fixed_shapes: let the batch shrink to powers of two only, for graphs of fixed shapes.
            patient: look at every sample whether its shortlist was long enough, which waits for the
                device; default where that costs nothing, on a CPU.
        """
        self.student = student
        self.teacher = teacher
        self._accept = accept
        self._stop_strings = stop_strings
        self._rollout_batch_size = rollout_batch_size
        self._fixed_shapes = fixed_shapes
        self._haste = Haste(never=student.device.type == "cpu" if patient is None else patient)
        self._adaptive = AdaptiveDraftLength()

    def interleave(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """SKD: the student proposes, the teacher verifies and replaces."""
        models = (self.student, self._require_teacher())
        draft_length = self._draft_length(params)
        watch = Stopwatch(self.student.device)
        seen: Counter[tuple[int, int]] = Counter()

        def advance(flight: Flight, caches: Sequence[Any]) -> None:
            num_draft = draft_length.choose(flight.num_seats, flight.longest_remaining)
            committed = self._settle(
                flight,
                lambda sampler: self._speculate(flight, caches, num_draft, params, sampler, watch),
                watch,
            )
            report = RoundReport(
                flight.num_seats,
                num_draft,
                *watch.laps()[-2:],
                num_verified=committed.num_tokens,
                num_accepted=committed.num_accepted,
            )
            shape = (flight.num_seats, num_draft)
            seen[shape] += 1
            # A shape's first two rounds run without a graph and record one: nothing to learn from.
            if not self._fixed_shapes or seen[shape] > 2:
                draft_length.observe(report)

        return self._run(models, prompts, params, advance, Source.INTERLEAVED)

    def sample_student(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """On-policy: every token is the student's own."""
        return self._sample(self.student, Source.STUDENT, prompts, params)

    def sample_teacher(self, prompts: Prompts, params: SamplingParams) -> Rollout:
        """Sequence-level KD: every token is the teacher's."""
        return self._sample(self._require_teacher(), Source.TEACHER, prompts, params)

    def _sample(
        self, lm: LanguageModel, source: Source, prompts: Prompts, params: SamplingParams
    ) -> Rollout:
        """Plain sampling from one model, a token per row and round."""
        by_student = source is Source.STUDENT
        role = Role.STUDENT if by_student else Role.TEACHER
        temperature = params.student_temperature if by_student else params.teacher_temperature
        top_p = params.student_top_p if by_student else params.teacher_top_p

        def advance(flight: Flight, caches: Sequence[Any]) -> None:
            def propose(sampler: RoundSampler) -> Proposal:
                hidden = lm.forward(
                    flight.pending[:, None], flight.positions(1), caches[0], flight.longest
                )
                uniforms = flight.uniforms(1)[role]
                tokens = sampler(
                    role.name.lower(), lm.logits(hidden[:, -1]), temperature, top_p, uniforms[:, 0]
                )
                one = torch.ones_like(tokens)
                return Proposal(
                    tokens=tokens[:, None],
                    limit=one,
                    num_accepted=one if by_student else torch.zeros_like(one),
                    proposed_ids=tokens[:, None] if by_student else None,
                    hidden=None,
                    settled=sampler.settled,
                )

            self._settle(flight, propose)

        return self._run((lm,), prompts, params, advance, source)

    def _run(
        self,
        models: Sequence[LanguageModel],
        prompts: Prompts,
        params: SamplingParams,
        advance: Callable[[Flight, Sequence[Any]], None],
        source: Source,
    ) -> Rollout:
        """Rounds until every row has ended; rows that wait are seated as others end."""
        flight = Flight(
            prompts,
            params.stop_token_ids,
            models[0].device,
            self._rollout_batch_size,
            _next_power_of_two if self._fixed_shapes else int,
            self._stop_strings,
        )
        caches = [lm.new_cache(flight.num_seats, flight.num_slots) for lm in models]
        _prefill(models, caches, flight.admit())
        while flight.any_live:
            advance(flight, caches)
            if flight.num_live == flight.num_seats:
                continue
            _prefill(models, caches, flight.admit())
            kept = flight.compact()
            if kept is not None:
                for lm, cache in zip(models, caches, strict=True):
                    cache.keep_rows(kept.to(lm.device))
        return flight.rollout(source)

    def _settle(
        self,
        flight: Flight,
        propose: Callable[[RoundSampler], Proposal],
        watch: Stopwatch | None = None,
    ) -> Committed:
        """Propose and commit: in haste, and once more with patience where haste was not enough."""
        attempts = (True,) if self._haste.given_up() else (False, True)
        for patient in attempts:
            try:
                verdict = flight.judge(propose(RoundSampler(patient, flight.live)))
            except NonFiniteLogitsError as error:
                # Rows of the rollout, not seats.
                raise NonFiniteLogitsError(flight.rows_at(error.rows), error.model) from error
            if watch is not None:
                watch.mark()
            committed = flight.commit(verdict)
            if not patient:
                self._haste.told(committed is not None)
            if committed is not None:
                return committed
        raise AssertionError("unreachable: a patient proposal is always settled")

    def _speculate(
        self,
        flight: Flight,
        caches: Sequence[Any],
        num_draft: int,
        params: SamplingParams,
        sampler: RoundSampler,
        watch: Stopwatch,
    ) -> Proposal:
        """Draft, verify, replace, once for all rows in flight."""
        teacher = self._require_teacher()
        width = num_draft + params.bonus_token
        uniforms = flight.uniforms(width)
        watch.mark()
        draft = self._draft(flight, caches[0], uniforms[Role.STUDENT], num_draft, params, sampler)
        watch.mark()
        # Verification happens where the teacher lives; only token ids travel.
        hidden = teacher.forward(
            draft.fed.to(teacher.device),
            flight.positions(width).to(teacher.device),
            caches[1],
            flight.longest + width - 1,
        )
        tokens, num_accepted = self._verify(hidden, draft, uniforms, params, sampler)
        return Proposal(
            tokens=tokens,
            limit=(num_accepted + 1).clamp(max=width),
            num_accepted=num_accepted,
            proposed_ids=draft.tokens,
            hidden=hidden,
            settled=sampler.settled,
        )

    def _draft(
        self,
        flight: Flight,
        cache: Any,
        uniforms: Tensor,
        num_draft: int,
        params: SamplingParams,
        sampler: RoundSampler,
    ) -> _Draft:
        """Sample `num_draft` tokens from the student, one after the other."""
        ratio = self._accept if isinstance(self._accept, RatioTest) else None
        positions = flight.positions(uniforms.shape[1])
        tokens, states, probs = [flight.pending], [], []
        for i in range(uniforms.shape[1]):
            hidden = self.student.forward(
                tokens[-1][:, None], positions[:, i : i + 1], cache, flight.longest + i
            )[:, -1]
            if i == num_draft:
                break  # a bonus token may follow the last proposal, which then has to be in the cache
            logits = self.student.logits(hidden)
            temperature, top_p = params.student_temperature, params.student_top_p
            tokens.append(sampler("student", logits, temperature, top_p, uniforms[:, i]))
            if ratio is not None:
                states.append(hidden.clone())  # a graph writes the next one to the same place
                probs.append(ratio.proposal_probs(logits, tokens[-1], params))
        return _Draft(
            fed=torch.stack(tokens[: uniforms.shape[1]], dim=1),
            tokens=torch.stack(tokens[1:], dim=1),
            states=torch.stack(states, dim=1) if states else None,
            probs=torch.stack(probs, dim=1) if probs else None,
        )

    def _verify(
        self,
        hidden: Tensor,
        draft: _Draft,
        uniforms: Tensor,
        params: SamplingParams,
        sampler: RoundSampler,
    ) -> tuple[Tensor, Tensor]:
        """Keep the proposals up to the first that the teacher refuses, replace that one.

        Args:
            hidden: the teacher's states [R, W, H], on its device.
            draft: the student's.
            uniforms: random numbers by role, float64 [3, R, W].
            params, sampler: how to sample.

        Returns:
            tokens int64 [R, W] (meaningless after the replacement), number accepted int64 [R], both on
            the device of the draft.
        """
        device, width, num_draft = hidden.device, hidden.shape[1], draft.tokens.shape[1]
        judged, uniforms = draft.tokens.to(device), uniforms.to(device)
        draws = uniforms[Role.ACCEPT, :, :num_draft]
        # Some rows at a time: logits of all of them need not exist together.
        num_rows = max(1, VERIFIED_ELEMENTS // (width * self._require_teacher().vocab_size))
        parts = [x.split(num_rows) for x in (hidden, judged, draws)]
        probs = None if draft.probs is None else draft.probs.to(device).split(num_rows)
        verdicts = [
            self._verdicts(*part, None if probs is None else probs[i], params)
            for i, part in enumerate(zip(*parts, strict=True))
        ]
        num_accepted, deciding = (torch.cat(parts) for parts in zip(*verdicts, strict=True))
        replacement = self._replacement(deciding, draft, num_accepted, params)
        # Where everything was accepted and no bonus asked for, the last index is sampled in vain.
        index = num_accepted.clamp(max=width - 1)[:, None]
        replaced_by = sampler(
            "teacher",
            replacement.logits,
            replacement.temperature,
            replacement.top_p,
            uniforms[Role.TEACHER].gather(1, index)[:, 0],
        )
        offsets = torch.arange(width, device=device)
        judged = torch.nn.functional.pad(judged, (0, width - num_draft))
        tokens = torch.where(offsets == num_accepted[:, None], replaced_by[:, None], judged)
        return tokens.to(draft.tokens.device), num_accepted.to(draft.tokens.device)

    def _verdicts(
        self,
        hidden: Tensor,
        proposed_ids: Tensor,
        uniforms: Tensor,
        proposal_probs: Tensor | None,
        params: SamplingParams,
    ) -> tuple[Tensor, Tensor]:
        """Number accepted int64 [r], and the logits [r, V] that decide about the replacement."""
        logits, num_draft = self._require_teacher().logits(hidden), proposed_ids.shape[1]
        judging = logits[:, :num_draft]
        if isinstance(self._accept, RatioTest):
            accepted = self._accept.accept(judging, proposed_ids, proposal_probs, uniforms, params)
        else:
            accepted = self._accept(judging, proposed_ids, uniforms, params)
        num_accepted = accepted.long().cumprod(dim=1).sum(dim=1)
        index = num_accepted.clamp(max=logits.shape[1] - 1)
        return num_accepted, logits.take_along_dim(index[:, None, None], dim=1)[:, 0]

    def _replacement(
        self, teacher_logits: Tensor, draft: _Draft, num_accepted: Tensor, params: SamplingParams
    ) -> Replacement:
        """What is sampled at the first rejection, or as a bonus: teacher_logits [R, V]."""
        if not isinstance(self._accept, RatioTest):
            return teacher_replacement(teacher_logits, params)
        num_draft = draft.tokens.shape[1]
        index = num_accepted.to(draft.states.device).clamp(max=num_draft - 1)
        states = draft.states.take_along_dim(index[:, None, None], dim=1)[:, 0]
        student_logits = self.student.logits(states).to(teacher_logits.device)
        return self._accept.replacement(
            teacher_logits, student_logits, num_accepted < num_draft, params
        )

    def _draft_length(self, params: SamplingParams) -> DraftLength:
        if params.num_draft_tokens == AUTO:
            return self._adaptive
        return FixedDraftLength(params.num_draft_tokens)

    def _require_teacher(self) -> LanguageModel:
        if self.teacher is None:
            raise ValueError("this rollout needs a teacher, and the engine was built without one")
        return self.teacher


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _prefill(
    models: Sequence[LanguageModel], caches: Sequence[Any], admitted: Sequence[tuple[int, Tensor]]
) -> None:
    """Put the prompts, all but their last tokens, into the caches of their seats."""
    for group in group_prompts(admitted, PREFILL_TOKENS):
        seats = torch.tensor([seat for seat, _ in group])
        ids = torch.nn.utils.rnn.pad_sequence([ids[:-1] for _, ids in group], batch_first=True)
        for lm, cache in zip(models, caches, strict=True):
            lm.prefill(ids.to(lm.device), seats.to(lm.device), cache)
