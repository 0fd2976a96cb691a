"""What a report holds, as an aligned table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from axolotl_skd.draft_report.measure import Measurement

_HEADER = (
    "student",
    "decoding",
    "acceptance",
    "alpha",
    "tokens/call",
    "speed-up",
    "tokens/s",
    "teacher alone",
    "same output",
)

_LEGEND = """\
acceptance: accepted / verified proposals, a verified one being accepted or its round's first rejection
alpha: closed form E sum_v min(p(v), q(v)) at temperature 1, over all positions of the teacher's samples
tokens/call: committed tokens per teacher forward, the teacher alone has 1
speed-up: of tokens per second against the teacher alone, median of the passes (lowest to highest)"""


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One run of the report.

    Attributes:
        settings: what was asked for, by name.
        measurements: one per student and way of decoding.
        alphas: the closed form, by student.
        notes: what the reader should know.
    """

    settings: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    alphas: Mapping[str, float]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "settings": dict(self.settings),
            "measurements": [
                {
                    **asdict(measurement),
                    "acceptance_rate": measurement.counts.acceptance_rate,
                    "tokens_per_teacher_call": measurement.counts.tokens_per_teacher_call,
                    "speedup": measurement.speedup,
                }
                for measurement in self.measurements
            ],
            "alpha": dict(self.alphas),
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """The settings, the table, its legend, the notes."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([settings, "", *self._table(), "", _LEGEND, *notes])

    def _table(self) -> list[str]:
        rows = [_HEADER, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for m in self.measurements:
            greedy = m.temperature == 0
            rate = m.counts.acceptance_rate
            yield (
                m.student,
                "greedy" if greedy else _sampled(m.temperature, m.top_p),
                "-" if rate is None else f"{rate:.3f}",
                "-" if greedy else f"{self.alphas[m.student]:.3f}",
                f"{m.counts.tokens_per_teacher_call:.2f}",
                f"{m.speedup:.2f} ({min(m.speedups):.2f} to {max(m.speedups):.2f})",
                f"{m.tokens_per_second:.1f}",
                f"{m.teacher_tokens_per_second:.1f}",
                "-" if m.equal_outputs is None else f"{100 * m.equal_outputs:.1f}%",
            )


def _sampled(temperature: float, top_p: float) -> str:
    text = f"sampled T={temperature:g}"
    return text if top_p == 1 else f"{text} top-p={top_p:g}"
