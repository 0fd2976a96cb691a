"""One completion of the teacher, alone or with the student as its draft, and its time.

The engine is transformers' own `generate`, unpatched, one prompt at a time (assisted generation takes
no more). Nothing is inherited from the models' generation configs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from axolotl_skd.draft_report.counting import SpeculationCounts, count_speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        temperature: 0 means greedy; else both models' logits are divided by it.
        top_p: nucleus of both models' distributions; 1 keeps everything.
        max_new_tokens: longest completion.
        stop_token_ids: end a completion and belong to it.
        pad_token_id: which generation wants to know.
    """

    temperature: float
    top_p: float = 1.0
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generation_arguments(self) -> dict[str, Any]:
        """Keywords of `generate`.

        Temperature and nucleus go in as processors, not as settings: the assistant gets the
        processors of the model that it assists and applies its settings on top of them, so that
        settings would warp the draft twice.
        """
        config = GenerationConfig(
            do_sample=not self.greedy,
            # transformers' own default would keep 50 tokens
            **({} if self.greedy else {"top_k": 0}),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.stop_token_ids),
            pad_token_id=self.pad_token_id,
        )
        processors = LogitsProcessorList()
        if not self.greedy and self.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if not self.greedy and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return {"generation_config": config, "logits_processor": processors}


@dataclass(frozen=True, slots=True)
class Completion:
    """What was decoded for one prompt.

    Attributes:
        ids: committed tokens, the stop token included.
        seconds: wall clock of the whole call, reading the prompt included.
        counts: of the speculation, None for the teacher alone.
    """

    ids: tuple[int, ...]
    seconds: float
    counts: SpeculationCounts | None


def forget_generation_settings(teacher: PreTrainedModel) -> None:
    """Drop what the checkpoint would add to the settings given here (Qwen2: a repetition penalty)."""
    teacher.generation_config = GenerationConfig()


def make_draft(student: PreTrainedModel, num_draft_tokens: int) -> None:
    """The same, and propose exactly `num_draft_tokens` a round, however unsure the student is."""
    student.generation_config = GenerationConfig(
        num_assistant_tokens=num_draft_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


def decode(
    teacher: PreTrainedModel,
    student: PreTrainedModel | None,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    seed: int,
) -> Completion:
    """Decode one prompt with the teacher, drafted by the student unless that is None.

    Args:
        teacher: see `forget_generation_settings`.
        student: see `make_draft`; has the teacher's vocabulary width.
        prompt_ids: of the prompt.
        decoding: how.
        seed: of torch's generators, which transformers draws from.
    """
    ids = torch.tensor([list(prompt_ids)], device=teacher.device)
    arguments = decoding.generation_arguments()
    if student is not None:
        arguments["assistant_model"] = student
    devices = {teacher.device} | ({student.device} if student is not None else set())
    torch.manual_seed(seed)
    with _fed_tokens(teacher) as fed:
        _synchronise(devices)
        start = time.perf_counter()
        sequence = teacher.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        _synchronise(devices)
        seconds = time.perf_counter() - start
    completion = tuple(sequence[0, ids.shape[1] :].tolist())
    if student is None:
        return Completion(completion, seconds, None)
    # The first call is fed the prompt, the others the token committed last, before the proposal.
    contexts = [ids.shape[1], *(1 for _ in fed[1:])]
    proposals = [
        tokens[0, context:].tolist() for tokens, context in zip(fed, contexts, strict=True)
    ]
    return Completion(completion, seconds, count_speculation(proposals, completion))


@contextmanager
def _fed_tokens(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The `input_ids` of every forward inside; kept where they are, not to stall an accelerator."""
    fed: list[Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    try:
        yield fed
    finally:
        hook.remove()


def _synchronise(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
