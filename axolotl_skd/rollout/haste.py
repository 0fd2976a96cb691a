"""Sampling without waiting for the device: in haste, and with patience where haste was not enough.

A sample from a shortlist is the one of the whole vocabulary if the shortlist was long enough, which
only the device knows. Asking at every token would make the host wait as often; so a round is sampled in
haste, asks once at its end, and is done again with patience if need be.

Legend: R rows in flight.
"""

from __future__ import annotations

from torch import Tensor

from axolotl_skd.rollout.sampling import (
    NonFiniteLogitsError,
    sample_from_shortlist,
    sample_top_p,
)


class RoundSampler:
    """Samples of one round: each looked at on the spot, or all at once by `settled`."""

    def __init__(self, patient: bool, live: Tensor) -> None:
        """
        Args:
            patient: look at each.
            live: bool [R], whose samples count.
        """
        self._patient = patient
        self._empty = ~live
        self._settled = live.new_ones(())

    @property
    def settled(self) -> Tensor:
        """bool [], True if every token is the one of the whole vocabulary."""
        return self._settled

    def __call__(
        self, model: str, logits: Tensor, temperature: float, top_p: float, uniforms: Tensor
    ) -> Tensor:
        """As `sample_top_p`, from the logits of the "student" or the "teacher"."""
        if self._patient:
            try:
                return sample_top_p(logits, temperature, top_p, uniforms)
            except NonFiniteLogitsError as error:
                raise NonFiniteLogitsError(error.rows, model) from None
        tokens, settled = sample_from_shortlist(logits, temperature, top_p, uniforms)
        self._settled = self._settled & (settled.to(self._empty.device) | self._empty).all()
        return tokens


class Haste:
    """Whether a round is worth trying in haste: less and less often while that keeps failing."""

    _LONGEST_PAUSE = 64

    def __init__(self, never: bool) -> None:
        self._never = never
        self._rounds_to_pause, self._pause = 0, 1

    def given_up(self) -> bool:
        """For this round; asked once a round."""
        if self._rounds_to_pause:
            self._rounds_to_pause -= 1
            return True
        return self._never

    def told(self, enough: bool) -> None:
        """How an attempt went."""
        if enough:
            self._pause = 1
            return
        self._rounds_to_pause = self._pause
        self._pause = min(2 * self._pause, self._LONGEST_PAUSE)
