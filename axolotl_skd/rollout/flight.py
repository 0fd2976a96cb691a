"""The rows of a rollout: those in flight, those that wait for a seat, results of all.

A seat is a row of the batch and of the KV caches. When a row finishes, its seat goes to one that waits;
when none waits, the batch is compacted. What decides about the next round (lengths, who is finished)
is mirrored on the host, so that one transfer per round keeps it up to date.

Legend: N rows, R seats, W tokens of a round, G of them proposed, T longest completion, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from axolotl_skd.rollout.sampling import Role, keyed_uniform
from axolotl_skd.rollout.stop_strings import StopStrings
from axolotl_skd.rollout.types import FinishReason, Prompts, Rollout, Source


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a round would append to the rows in flight, before anybody has looked at it.

    Attributes:
        tokens: int64 [R, W].
        limit: int64 [R], how many of them stand.
        num_accepted: int64 [R], how many of those are the student's own.
        proposed_ids: int64 [R, G], what the student had proposed for the first G, None if it did not.
        hidden: [R, W, H], the teacher's states that predict them, None without a verification.
        settled: bool [], False if a shortlist was too short and the tokens may be wrong.
    """

    tokens: Tensor
    limit: Tensor
    num_accepted: Tensor
    proposed_ids: Tensor | None
    hidden: Tensor | None
    settled: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """A proposal and what of it is to be appended, still on the device.

    Attributes:
        proposal: the proposal.
        count: int64 [R], tokens that each row takes.
        stopped: bool [R], True where the last of them ends the completion.
        num_accepted: int64 [R], how many of them are the student's own.
    """

    proposal: Proposal
    count: Tensor
    stopped: Tensor
    num_accepted: Tensor


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a round, on the host.

    Attributes:
        num_tokens: appended to all rows together.
        num_accepted: of those the student's own.
    """

    num_tokens: int
    num_accepted: int


class Flight:
    """State of the seats on the device, its mirror on the host, results of all rows.

    Results carry one spare column at the end, where tokens that are not committed are written.
    """

    def __init__(
        self,
        prompts: Prompts,
        stop_ids: tuple[int, ...],
        device: torch.device,
        num_seats: int | None = None,
        seats_for: Callable[[int], int] = lambda num_rows: num_rows,
        stop_strings: StopStrings | None = None,
    ) -> None:
        """
        Args:
            prompts: all rows.
            stop_ids: tokens that end a row.
            device: of the state, the student's.
            num_seats: most rows in flight, default all.
            seats_for: seats that a number of rows in flight is given; more than that many stay empty.
                Never more than `num_seats`.
            stop_strings: texts that end a row.
        """
        self._prompts = prompts
        self._seats_for = seats_for
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        num_rows = len(prompts.ids)
        self._lengths = [len(row) for row in prompts.ids]
        self._max_new = prompts.max_new_tokens.tolist()
        self._waiting = list(range(num_rows))
        if num_seats is None:
            self.num_seats = seats_for(num_rows)
        else:
            self.num_seats = min(seats_for(min(num_seats, num_rows)), num_seats)
        self.num_slots = max(map(sum, zip(self._lengths, self._max_new, strict=True)))
        # The seats, on the device. `next` is the position of the token to come, `end` where the row's
        # length ends it; a seat is empty iff next == end.
        self._streams = prompts.streams.to(device)
        zeros = torch.zeros(self.num_seats, dtype=torch.long, device=device)
        self._row, self._stream, self._start = zeros, zeros.clone(), zeros.clone()
        self._next, self._end, self._pending = zeros + 1, zeros + 1, zeros.clone()
        # Their mirror on the host.
        self._host_row = [0] * self.num_seats
        self._host_next, self._host_end = [1] * self.num_seats, [1] * self.num_seats
        self._stop_strings = stop_strings
        self._recent: list[list[int]] = [[] for _ in range(num_rows)]  # last tokens, if they matter
        # Results.
        self._width = max(self._max_new)
        self._ids = torch.zeros(num_rows, self._width + 1, dtype=torch.long, device=device)
        self._proposed = torch.full_like(self._ids, -1)
        self._accepted = torch.zeros_like(self._ids, dtype=torch.bool)
        self._hidden: Tensor | None = None
        self._generated = [0] * num_rows
        self._num_proposed = [0] * num_rows
        self._finish_reasons = [int(FinishReason.LENGTH)] * num_rows
        self._num_rounds = self._num_draft_steps = 0

    # Seats

    @property
    def any_live(self) -> bool:
        return any(self._live(seat) for seat in range(self.num_seats))

    @property
    def num_live(self) -> int:
        return sum(self._live(seat) for seat in range(self.num_seats))

    @property
    def longest(self) -> int:
        """Tokens of the longest row that has a seat, the pending one included."""
        return max(self._host_next)

    @property
    def longest_remaining(self) -> int:
        """Tokens still to come in the row that has most of them."""
        return max(end - at for at, end in zip(self._host_next, self._host_end, strict=True))

    @property
    def live(self) -> Tensor:
        """bool [R] on the device, False where a seat is empty."""
        return self._next < self._end

    @property
    def device(self) -> torch.device:
        return self._next.device

    def rows_at(self, seats: Sequence[int]) -> list[int]:
        """The rows of the rollout that sit there, without the empty seats."""
        return [self._host_row[seat] for seat in seats if self._live(seat)]

    def _live(self, seat: int) -> bool:
        return self._host_next[seat] < self._host_end[seat]

    def admit(self) -> list[tuple[int, Tensor]]:
        """Seat waiting rows: (seat, prompt ids) of each. All ids but the last belong in the caches."""
        empty = [seat for seat in range(self.num_seats) if not self._live(seat)]
        admitted = list(zip(empty, self._waiting, strict=False))
        if not admitted:
            return []
        self._waiting = self._waiting[len(admitted) :]
        for seat, row in admitted:
            self._host_row[seat] = row
            self._host_next[seat] = self._lengths[row]
            self._host_end[seat] = self._lengths[row] + self._max_new[row]
        device = self.device
        seats, rows = (
            torch.tensor(values, device=device) for values in zip(*admitted, strict=True)
        )
        prompts = [self._prompts.ids[row] for _, row in admitted]
        starts = torch.tensor([len(ids) for ids in prompts], device=device)
        self._row[seats], self._stream[seats] = rows, self._streams[rows]
        self._start[seats], self._next[seats] = starts, starts
        self._end[seats] = torch.tensor(
            [self._host_end[seat] for seat, _ in admitted], device=device
        )
        self._pending[seats] = torch.stack([ids[-1] for ids in prompts]).to(device)
        return [(seat, ids) for (seat, _), ids in zip(admitted, prompts, strict=True)]

    def compact(self) -> Tensor | None:
        """Give up seats that nobody waits for: indices of those that stay (int64), None if all do."""
        keep = [seat for seat in range(self.num_seats) if self._live(seat)]
        wanted = self._seats_for(len(keep))
        if wanted >= self.num_seats or not keep:
            return None
        empty = (seat for seat in range(self.num_seats) if not self._live(seat))
        keep += [seat for _, seat in zip(range(wanted - len(keep)), empty, strict=False)]
        self.num_seats = len(keep)
        for name in ("_host_row", "_host_next", "_host_end"):
            setattr(self, name, [getattr(self, name)[seat] for seat in keep])
        index = torch.tensor(keep, device=self.device)
        for name in ("_row", "_stream", "_start", "_next", "_end", "_pending"):
            setattr(self, name, getattr(self, name)[index])
        return index

    # A round

    @property
    def pending(self) -> Tensor:
        """int64 [R], the last token of each row: committed, not yet in the caches."""
        return self._pending

    def positions(self, num_tokens: int) -> Tensor:
        """Where the pending token and its `num_tokens` - 1 successors go, int64 [R, num_tokens].

        Clamped to the last position of the row: what would lie past it predicts tokens that are
        never committed, and no model is asked for a position that it does not have.
        """
        offsets = torch.arange(num_tokens, device=self.device)
        return torch.minimum((self._next - 1)[:, None] + offsets, (self._end - 1)[:, None])

    def uniforms(self, num_tokens: int) -> Tensor:
        """Random numbers of the next tokens, keyed by their positions.

        Returns:
            float64 [3, R, num_tokens], by `Role`: of the student, the teacher and acceptance.
        """
        offsets = torch.arange(num_tokens, device=self.device)
        roles = torch.arange(Role.ACCEPT + 1, device=self.device)[:, None, None]
        return keyed_uniform(self._stream[:, None], self._next[:, None] + offsets, roles)

    def judge(self, proposal: Proposal) -> Verdict:
        """How much of a proposal each row takes: up to its length or first stop token."""
        tokens = proposal.tokens
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        limit = torch.minimum(proposal.limit, self._end - self._next)
        # No torch.isin: with many stop tokens it sorts, and waits for the device.
        ends = (tokens[:, :, None] == self._stop_ids).any(dim=-1)
        stops = ends & (offsets < limit[:, None])
        stopped = stops.any(dim=1)
        count = torch.where(stopped, stops.int().argmax(dim=1) + 1, limit)
        accepted = torch.minimum(proposal.num_accepted, count)

        return Verdict(proposal, count, stopped, accepted)

    def commit(self, verdict: Verdict) -> Committed | None:
        """Append a round's tokens. Waits for the device, once.

        Returns:
            None if the proposal is not settled, and then nothing has changed.
        """
        proposal = verdict.proposal
        settled = proposal.settled.to(verdict.count).expand(len(verdict.count))
        report = [verdict.count, verdict.stopped.to(verdict.count), verdict.num_accepted, settled]
        if self._stop_strings is not None:
            report += proposal.tokens.unbind(dim=1)
        counts, stops, kept, (settled_at_all, *_), *columns = torch.stack(report).tolist()
        if not settled_at_all:
            return None
        if self._stop_strings is not None:
            cut = self._cut(counts, list(zip(*columns, strict=True)))
            if cut:
                for seat, end in cut.items():
                    counts[seat], stops[seat], kept[seat] = end, 1, min(kept[seat], end)
                verdict = replace(
                    verdict,
                    count=verdict.count.new_tensor(counts),
                    stopped=verdict.stopped.new_tensor(stops),
                    num_accepted=verdict.num_accepted.new_tensor(kept),
                )
        count, accepted = verdict.count, verdict.num_accepted

        tokens = proposal.tokens
        num_tokens = tokens.shape[1]
        offsets = torch.arange(num_tokens, device=tokens.device)
        rows = self._row[:, None]
        columns = (self._next - self._start)[:, None] + offsets
        columns = torch.where(offsets < count[:, None], columns, self._width)
        self._ids[rows, columns] = tokens
        self._accepted[rows, columns] = offsets < accepted[:, None]
        if proposal.proposed_ids is not None:
            num_proposed = proposal.proposed_ids.shape[1]
            self._proposed[rows, columns[:, :num_proposed]] = proposal.proposed_ids
        if proposal.hidden is not None:
            self._store(proposal.hidden, rows, columns)
        last = (count - 1).clamp(min=0)[:, None]
        self._pending = torch.where(count > 0, tokens.gather(1, last)[:, 0], self._pending)
        self._next = self._next + count
        self._end = torch.where(verdict.stopped, self._next, self._end)

        for seat in range(self.num_seats):
            if not self._live(seat):
                continue
            row = self._host_row[seat]
            self._generated[row] += counts[seat]
            self._host_next[seat] += counts[seat]
            if proposal.proposed_ids is not None:
                self._num_proposed[row] += num_proposed
            if stops[seat]:
                self._host_end[seat] = self._host_next[seat]
                self._finish_reasons[row] = int(FinishReason.STOP)
        self._num_rounds += 1
        if proposal.hidden is not None:
            self._num_draft_steps += num_tokens
        return Committed(sum(counts), sum(kept))

    def _cut(self, counts: Sequence[int], tokens: Sequence[Sequence[int]]) -> dict[int, int]:
        """Seats whose tokens complete a stop string -> how many of their tokens are left."""
        cut = {}
        for seat, count in enumerate(counts):
            if not self._live(seat):
                continue
            row, new = self._host_row[seat], tokens[seat][:count]
            end = self._stop_strings.ending(self._recent[row], new)
            if end is not None:
                cut[seat] = end
            self._recent[row] = [*self._recent[row], *new][-self._stop_strings.num_tokens :]
        return cut

    def _store(self, hidden: Tensor, rows: Tensor, columns: Tensor) -> None:
        if self._hidden is None:
            shape = (len(self._generated), self._width + 1, hidden.shape[-1])
            self._hidden = hidden.new_zeros(shape)
        self._hidden[rows.to(hidden.device), columns.to(hidden.device)] = hidden

    def rollout(self, source: Source) -> Rollout:
        """The finished record, trimmed to the longest completion."""
        device = self._ids.device
        width = max(self._generated)
        lengths = torch.tensor(self._generated, device=device)
        mask = torch.arange(width, device=device) < lengths[:, None]
        return Rollout(
            completion_ids=self._ids[:, :width] * mask,
            completion_mask=mask,
            accepted_mask=self._accepted[:, :width] & mask,
            proposed_ids=self._proposed[:, :width],
            teacher_hidden=None if self._hidden is None else self._hidden[:, :width],
            finish_reasons=torch.tensor(self._finish_reasons, device=device),
            num_proposed=torch.tensor(self._num_proposed, device=device),
            source=source,
            num_rounds=self._num_rounds,
            num_draft_steps=self._num_draft_steps,
        )


def group_prompts(
    admitted: Sequence[tuple[int, Tensor]], most_tokens: int
) -> list[list[tuple[int, Tensor]]]:
    """Prompts of similar length together, so that a group is at most `most_tokens` with its padding.

    A prompt's last token stays pending and does not count; a prompt of one token needs no group.
    """
    groups: list[list[tuple[int, Tensor]]] = []
    for seat, ids in sorted(admitted, key=lambda entry: -len(entry[1])):
        if len(ids) == 1:
            break
        if groups and (len(groups[-1]) + 1) * (len(groups[-1][0][1]) - 1) <= most_tokens:
            groups[-1].append((seat, ids))
        else:
            groups.append([(seat, ids)])
    return groups
