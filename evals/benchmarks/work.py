"""What contenders have to do: the models, the rows and how they are sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Cell, Facts
from models import Pair, load_tiny_pair, random_prompts, tiny_tokenizer

from axolotl_skd.resources import resource_path
from axolotl_skd.rollout.sampling import row_streams
from axolotl_skd.rollout.types import Prompts, SamplingParams

PROMPT_TOKENS = (40, 64)
SEED = 7
PUBLISHED_DRAFT = 5  # of the paper, and of the contenders that do not choose theirs
SAMPLING = dict(
    student_temperature=0.5,
    student_top_p=0.5,
    teacher_temperature=0.2,
    teacher_top_p=1.0,
)

Draft = int | str


@dataclass(frozen=True, slots=True)
class Work:
    """What a group of contenders has to do.

    Attributes:
        name: of the group, part of every cell's name.
        pair: the models.
        prompts: the rows.
        stop_ids: that end a row.
        top_k: K of the acceptance test.
    """

    name: str
    pair: Pair
    prompts: Prompts
    stop_ids: tuple[int, ...] = ()
    top_k: int = 25

    def params(self, draft: Draft) -> SamplingParams:
        return SamplingParams(
            num_draft_tokens=draft,
            teacher_top_k=self.top_k,
            stop_token_ids=self.stop_ids,
            **SAMPLING,
        )

    def cell(
        self,
        contender: str,
        run: Callable[[], Facts],
        rate: float | None = None,
        repeats: int | None = None,
        **settings: Any,
    ) -> Cell:
        """A contender at an acceptance rate (None: real acceptance, or none at all)."""
        at = "" if rate is None else f", a = {rate}"
        settings |= {"contender": contender, "group": self.name, "acceptance": rate}
        return Cell(f"{contender}{at}, {self.name}", run, settings, repeats=repeats)


def make_work(pair: Pair, num_rows: int, max_new: int | torch.Tensor, name: str = "") -> Work:
    """Random prompts, completions of `max_new` tokens (one number, or one per row)."""
    limits = max_new if isinstance(max_new, torch.Tensor) else torch.full((num_rows,), max_new)
    vocab_size = pair.student.config.get_text_config().vocab_size
    prompts = Prompts(
        random_prompts(num_rows, vocab_size, *PROMPT_TOKENS), _streams(num_rows), limits
    )
    return Work(name or f"B = {num_rows}, T = {max_new}", pair, prompts)


def tiny_work(device: torch.device, num_rows: int, max_new: int) -> Work:
    """The embedded pair on its own validation problems, ended by its own stop token."""
    pair, tokenizer = load_tiny_pair(device), tiny_tokenizer()
    lines = Path(resource_path("example_configs"), "tiny/data/validation.jsonl").read_text()
    rows = [json.loads(line)["messages"][:1] for line in lines.splitlines()[:num_rows]]
    ids = [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False)
        for row in rows
    ]
    prompts = Prompts(
        tuple(map(torch.tensor, ids)), _streams(num_rows), torch.full((num_rows,), max_new)
    )
    stop_ids = (tokenizer.eos_token_id,)
    return Work(f"tiny pair, B = {num_rows}", pair, prompts, stop_ids, top_k=3)


def _streams(num_rows: int) -> torch.Tensor:
    return row_streams(seed=SEED, epoch=0, sample_ids=torch.arange(num_rows))
