"""From a training config to a report: `axolotl skd speedup CONFIG`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from axolotl.utils.logging import get_logger

from axolotl_skd.draft_report.decoding import decode
from axolotl_skd.draft_report.measure import Measurement, expected_acceptance, measure
from axolotl_skd.draft_report.options import ReportOptions
from axolotl_skd.draft_report.report import DraftReport
from axolotl_skd.draft_report.setup import prepare

LOG = get_logger(__name__)


def draft_report(config: Path, options: ReportOptions) -> DraftReport:
    """Measure the student of a training config as a draft for its teacher; no model is saved.

    Args:
        config: the YAML that trained, or will train, the student.
        options: of the command line.

    Raises:
        rollout.lm.UnsupportedModelError, and see `setup.prepare`
    """
    setup = prepare(config, options)
    teacher, students, prompts = setup.teacher, setup.students, setup.prompts
    greedy = replace(setup.untempered, temperature=0.0)
    sampled = replace(setup.untempered, temperature=options.temperature, top_p=options.top_p)
    measurements: list[Measurement] = []
    for decoding in (greedy, sampled):
        measurements += measure(
            teacher,
            students,
            prompts,
            decoding,
            repeats=options.repeats,
            seed=setup.seed,
            progress=LOG.info,
        )
    LOG.info("sampling from the teacher for the closed form")
    samples = [
        decode(teacher, None, prompt, setup.untempered, setup.seed + index).ids
        for index, prompt in enumerate(prompts)
    ]
    order = list(students)
    return DraftReport(
        settings=setup.settings,
        measurements=tuple(sorted(measurements, key=lambda m: order.index(m.student))),
        alphas=expected_acceptance(teacher, students, prompts, samples),
        notes=(*setup.notes, *_notes(measurements, teacher.dtype)),
    )


def _notes(measurements: Sequence[Measurement], dtype: torch.dtype) -> list[str]:
    notes = [
        f"{m.student}: {100 * (1 - m.equal_outputs):.1f}% of the greedy outputs differ from the "
        f"teacher's alone; forwards of other shapes round differently near ties ({dtype})"
        for m in measurements
        if m.equal_outputs is not None and m.equal_outputs < 1
    ]
    if any(m.speedup < 1 for m in measurements):
        notes.append(
            "a speed-up below 1 is a slow-down: here drafting costs more than the teacher calls that "
            "it saves"
        )
    return notes
