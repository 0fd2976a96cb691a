"""What the command line says beside the config; light enough for it to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """How to make a report.

    Attributes:
        prompts: file of prompts; at most one of `prompts` and `task`.
        task: bundled lm-eval task whose questions are the prompts.
        limit: only the first so many prompts.
        max_new_tokens: longest completion, default `distillation.rollout.max_new_tokens`.
        num_draft_tokens: proposals a round, default `distillation.rollout.num_draft_tokens`.
        temperature, top_p: of the sampled run.
        repeats: timed passes over the prompts.
        seed: of the samples, default the config's.
    """

    prompts: Path | None = None
    task: str | None = None
    limit: int = 32
    max_new_tokens: int | None = None
    num_draft_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    repeats: int = 3
    seed: int | None = None
