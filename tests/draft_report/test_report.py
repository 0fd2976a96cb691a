"""The table and the JSON of hand-made measurements."""

from __future__ import annotations

import json

from axolotl_skd.draft_report.counting import SpeculationCounts
from axolotl_skd.draft_report.measure import Measurement
from axolotl_skd.draft_report.report import DraftReport


def report() -> DraftReport:
    def measurement(student: str, temperature: float, accepted: int) -> Measurement:
        return Measurement(
            student=student,
            temperature=temperature,
            top_p=1.0 if student == "before" else 0.9,
            counts=SpeculationCounts(20, 16, accepted, 4, 18),
            speedups=(1.5, 1.0, 1.25),
            tokens_per_second=50.0,
            teacher_tokens_per_second=40.0,
            equal_outputs=None if temperature else 0.75,
        )

    return DraftReport(
        settings={"prompts": "4 of a.txt", "seed": 1},
        measurements=(
            measurement("before", 0.0, 8),
            measurement("before", 1.0, 4),
            measurement("after", 0.7, 12),
        ),
        alphas={"before": 0.3, "after": 0.8},
        notes=("something",),
    )


def test_the_table() -> None:
    lines = report().as_text().splitlines()
    assert lines[0] == "prompts 4 of a.txt, seed 1"
    assert lines[2:6] == [
        "student  decoding                 acceptance  alpha  tokens/call  speed-up             "
        "tokens/s  teacher alone  same output",
        "before   greedy                   0.500       -      4.50         1.25 (1.00 to 1.50)  "
        "50.0      40.0           75.0%",
        "before   sampled T=1              0.250       0.300  4.50         1.25 (1.00 to 1.50)  "
        "50.0      40.0           -",
        "after    sampled T=0.7 top-p=0.9  0.750       0.800  4.50         1.25 (1.00 to 1.50)  "
        "50.0      40.0           -",
    ]
    assert lines[-1] == "note: something"


def test_the_json_holds_everything() -> None:
    got = json.loads(json.dumps(report().as_json()))
    assert got["settings"] == {"prompts": "4 of a.txt", "seed": 1}
    assert got["alpha"] == {"before": 0.3, "after": 0.8}
    assert got["notes"] == ["something"]
    first = got["measurements"][0]
    assert first["counts"] == {
        "proposed": 20,
        "verified": 16,
        "accepted": 8,
        "teacher_calls": 4,
        "tokens": 18,
    }
    assert (first["acceptance_rate"], first["tokens_per_teacher_call"]) == (0.5, 4.5)
    assert (first["speedup"], first["speedups"]) == (1.25, [1.5, 1.0, 1.25])
