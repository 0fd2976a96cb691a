"""What stops a draft-model report."""

from __future__ import annotations


class DraftReportError(ValueError):
    """The report cannot be made: what was got, what is needed, what to do."""
