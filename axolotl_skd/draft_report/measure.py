"""The measurement: teacher alone and teacher with each draft, prompt by prompt, several times over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from transformers import PreTrainedModel

from axolotl_skd.draft_report.closed_form import completion_overlaps
from axolotl_skd.draft_report.counting import SpeculationCounts, total
from axolotl_skd.draft_report.decoding import Completion, Decoding, decode
from axolotl_skd.rollout.lm import probed_lm


@dataclass(frozen=True, slots=True)
class Measurement:
    """One draft under one way of decoding.

    Attributes:
        student: "before" or "after" distillation.
        temperature, top_p: of the decoding, 0 means greedy.
        counts: of all repeats.
        speedups: one per repeat: tokens per second with the draft / of the teacher alone.
        tokens_per_second: with the draft, median of the repeats.
        teacher_tokens_per_second: of the teacher alone, median of the repeats.
        equal_outputs: share of prompts that gave the tokens of the teacher alone; None when sampling,
            where only the distributions are equal.
    """

    student: str
    temperature: float
    top_p: float
    counts: SpeculationCounts
    speedups: tuple[float, ...]
    tokens_per_second: float
    teacher_tokens_per_second: float
    equal_outputs: float | None

    @property
    def speedup(self) -> float:
        """Median of the repeats."""
        return median(self.speedups)


def measure(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    repeats: int,
    seed: int,
    progress: Callable[[str], None] = lambda _message: None,
) -> list[Measurement]:
    """Measure every student as a draft under one way of decoding.

    For each prompt all contenders take their turn before the next, so that a machine that slows down
    slows all of them; the first prompt is run once untimed before. Sampled repeats draw anew.

    Args:
        teacher, students: ready for `decode`; student names as the report has them.
        prompts: token ids.
        decoding: greedy or sampled.
        repeats: passes over the prompts.
        seed: of the samples.
        progress: called with a line before each pass.

    Returns:
        one measurement per student.
    """
    contenders: dict[str | None, PreTrainedModel | None] = {None: None, **students}
    for student in contenders.values():
        decode(teacher, student, prompts[0], decoding, seed)
    passes: dict[str | None, list[list[Completion]]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        progress(f"{'greedy' if decoding.greedy else 'sampled'}, pass {repeat + 1} of {repeats}")
        for name in contenders:
            passes[name].append([])
        for index, prompt in enumerate(prompts):
            for name, student in contenders.items():
                draw = seed + repeat * len(prompts) + index
                passes[name][-1].append(decode(teacher, student, prompt, decoding, draw))
    alone = passes.pop(None)
    return [_summary(name, decoding, drafted, alone) for name, drafted in passes.items() if name]


def _summary(
    student: str,
    decoding: Decoding,
    drafted: Sequence[Sequence[Completion]],
    alone: Sequence[Sequence[Completion]],
) -> Measurement:
    speeds, teacher_speeds = list(map(_speed, drafted)), list(map(_speed, alone))
    pairs = zip(drafted[0], alone[0], strict=True)
    return Measurement(
        student=student,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        counts=total([c.counts for completions in drafted for c in completions if c.counts]),
        speedups=tuple(a / b for a, b in zip(speeds, teacher_speeds, strict=True)),
        tokens_per_second=median(speeds),
        teacher_tokens_per_second=median(teacher_speeds),
        equal_outputs=fmean(a.ids == b.ids for a, b in pairs) if decoding.greedy else None,
    )


def _speed(completions: Sequence[Completion]) -> float:
    """Tokens per second; sampled texts differ in length, so that times alone do not compare."""
    return sum(len(c.ids) for c in completions) / sum(c.seconds for c in completions)


def expected_acceptance(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> dict[str, float]:
    """alpha of every student: the mean overlap over all positions of the teacher's samples.

    Args:
        teacher, students: of one vocabulary width, in evaluation mode.
        prompts: token ids.
        completions: untempered samples of the teacher, one per prompt.

    Raises:
        rollout.lm.UnsupportedModelError: a model whose forward cannot be reproduced.
    """
    teacher_lm = probed_lm(teacher, "distillation.teacher.base_model")
    alphas = {}
    for name, model in students.items():
        student_lm = probed_lm(model, f"the student {name} distillation")
        overlaps = [
            completion_overlaps(teacher_lm, student_lm, prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        alphas[name] = float(torch.cat(overlaps).mean())
    return alphas
