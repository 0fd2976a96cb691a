"""What can be wrong with COMET: nothing to score with, or a checkpoint that is not understood."""

from __future__ import annotations


class CometUnavailableError(RuntimeError):
    """Files or a program that COMET needs are not there; says how to get them."""


class CometCheckpointError(ValueError):
    """A checkpoint that the built-in estimator does not understand and so refuses to score with."""
