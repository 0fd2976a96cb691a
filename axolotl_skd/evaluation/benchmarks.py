"""The bundled benchmarks: their sources, and their rows as the task YAMLs want them.

A row of a benchmark with answers has `question`, `answer` (the reference, as `grade` takes it),
`benchmark` and `breakdown`: the names of the metrics beside `acc` that it counts for, e.g.
`["acc_algebra", "acc_level_5"]`. `BREAKDOWNS` has all that there are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from axolotl_skd.evaluation.data_sources import DataSource, Row
from axolotl_skd.evaluation.extraction import extract_boxed, extract_hash

LOG = logging.getLogger(__name__)

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

_MATH_BREAKDOWN = (*SUBJECTS, *(f"level_{level}" for level in range(1, 6)))
_TYPES: dict[str, tuple[str, ...]] = {
    "gsm_plus": (
        "numerical_substitution",
        "digit_expansion",
        "integer_decimal_fraction_conversion",
        "adding_operation",
        "reversing_operation",
        "problem_understanding",
        "distraction_insertion",
        "critical_thinking",
    ),
    "math": _MATH_BREAKDOWN,
    "asdiv": (
        "addition",
        "algebra_1",
        "algebra_2",
        "ceil_division",
        "common_division",
        "comparison",
        "difference",
        "floor_division",
        "gcd",
        "geometry",
        "lcm",
        "multiplication",
        "number_operation",
        "number_pattern",
        "ratio",
        "sequential_operation",
        "set_operation",
        "subtraction",
        "sum",
        "surplus",
        "tvq_change",
        "tvq_final",
        "tvq_initial",
        "unit_trans",
    ),
    "svamp": ("addition", "common_division", "multiplication", "subtraction"),
    "gsm8k": (),
}
BREAKDOWNS = {name: tuple(f"acc_{kind}" for kind in kinds) for name, kinds in _TYPES.items()}

# Other spellings in the releases, misspelt ones among them.
_SPELLINGS = {
    "substraction": "subtraction",
    "common_divison": "common_division",
    "counting_probability": "counting_and_probability",
    "unittrans": "unit_trans",
}


def load_benchmark(name: str) -> list[Row]:
    """The rows of a benchmark, ready for its task.

    Args:
        name: a key of `BENCHMARKS`.

    Raises:
        DataUnavailableError: if there are no data, naming both ways to get them.
        ValueError: if a row is not what its benchmark has.
    """
    benchmark = BENCHMARKS[name]
    rows = benchmark.read(*(source.load() for source in benchmark.sources))
    if len(rows) != benchmark.size:
        LOG.warning(
            "%s has %d rows here instead of %d: its scores do not compare with published ones",
            name,
            len(rows),
            benchmark.size,
        )
    return rows


def _gsm_plus(rows: Sequence[Row]) -> list[Row]:
    return [
        _question(
            "gsm_plus",
            row["question"],
            "None" if row["answer"] is None else str(row["answer"]),
            [row["perturbation_type"]],
        )
        for row in rows
    ]


def _math(rows: Sequence[Row]) -> list[Row]:
    return [
        _question(
            "math",
            row["problem"],
            row.get("answer") or _boxed_reference(row["solution"]),
            [row.get("type") or row["subject"], *_level(row["level"])],
        )
        for row in rows
    ]


def _level(level: str | int) -> list[str]:
    """`Level 5` and 5 as `["Level 5"]`; none where the release says `Level ?`."""
    number = str(level).removeprefix("Level ").strip()
    return [] if number == "?" else [f"Level {number}"]


def _boxed_reference(solution: str) -> str:
    r"""The answer of a reference solution; a few have it in a `\boxed 5` without braces."""
    boxed = extract_boxed(solution)
    if boxed is None and (unbraced := re.findall(r"\\(?:boxed|fbox)\s*([^\s{$][^$]*)", solution)):
        boxed = unbraced[-1].rstrip("., ")
    if boxed is None:
        raise ValueError(f"the reference solution has no boxed answer: {solution[-200:]!r}")
    return boxed


def _asdiv(rows: Sequence[Row]) -> list[Row]:
    return [
        _question(
            "asdiv",
            f"{row['body'].strip()} {row['question'].strip()}",
            _without_units(row["answer"]),
            [row["solution_type"]],
        )
        for row in rows
    ]


def _without_units(answer: str) -> str:
    """`9 (apples); 5 (pears)` as `9; 5`; `-(1/3)` stays."""
    parts = (re.sub(r"\s+\([^()]*\)$", "", part.strip()) for part in answer.split(";"))
    return "; ".join(parts)


def _svamp(rows: Sequence[Row]) -> list[Row]:
    return [
        _question("svamp", _svamp_question(row), _plain_number(row["Answer"]), [row["Type"]])
        for row in rows
    ]


def _svamp_question(row: Row) -> str:
    """Body and question, with the full stop between them that some bodies lack."""
    body = row["Body"].strip()
    return f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"


def _plain_number(value: str | float) -> str:
    """51.0 as `51`."""
    number = float(value)
    return str(int(number)) if number.is_integer() else str(number)


def _gsm8k(rows: Sequence[Row]) -> list[Row]:
    return [_question("gsm8k", row["question"], _hash_reference(row["answer"])) for row in rows]


def _hash_reference(solution: str) -> str:
    answer = extract_hash(solution)
    if answer is None:
        raise ValueError(f"the reference solution has no '####': {solution[-200:]!r}")
    return answer


def _question(benchmark: str, question: str, answer: str, kinds: Iterable[str] = ()) -> Row:
    metrics = [f"acc_{_slug(kind)}" for kind in kinds]
    if unknown := set(metrics) - set(BREAKDOWNS[benchmark]):
        raise ValueError(
            f"{benchmark} has a row of an unknown kind, {', '.join(sorted(unknown))}: {question!r}"
        )
    return {
        "benchmark": benchmark,
        "question": question,
        "answer": answer.strip(),
        "breakdown": metrics,
    }


def _slug(kind: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    return _SPELLINGS.get(slug, slug)


def _dialogsum(rows: Sequence[Row]) -> list[Row]:
    """One row per dialogue with all its summaries, which the hub has on rows of their own."""
    return [
        {"dialogue": dialogue, "summaries": [text for row in group for text in _summaries(row)]}
        for dialogue, group in groupby(rows, key=lambda row: row["dialogue"].strip())
    ]


def _summaries(row: Row) -> list[str]:
    names = [name for name in ("summary", "summary1", "summary2", "summary3") if row.get(name)]
    return [row[name].strip() for name in names]


def _flores(sources: Sequence[Row], references: Sequence[Row]) -> list[Row]:
    if len(sources) != len(references):
        raise ValueError(
            f"Flores has {len(sources)} Assamese and {len(references)} English sentences here; "
            "they must be the same, line by line"
        )
    for source, reference in zip(sources, references, strict=True):
        if source.get("id") != reference.get("id"):
            raise ValueError(f"Flores rows do not pair: ids {source['id']} and {reference['id']}")
    return [
        {"source": source["text"].strip(), "reference": reference["text"].strip()}
        for source, reference in zip(sources, references, strict=True)
    ]


def _flores_source(language: str) -> DataSource:
    return DataSource(
        repo="openlanguagedata/flores_plus",
        configs=(language,),
        splits=("devtest",),
        files=(
            (f"flores/devtest/{language}.devtest",),
            (f"flores/devtest/{language}.parquet",),
            (f"flores/devtest/{language}.jsonl",),
        ),
    )


def _math_source(subjects: Sequence[str]) -> DataSource:
    return DataSource(
        repo="EleutherAI/hendrycks_math",
        configs=tuple(subjects),
        splits=("test",),
        files=(
            tuple(f"math/test/{subject}/*.json" for subject in subjects),
            tuple(f"math/{subject}/test-*.parquet" for subject in subjects),
        ),
    )


def _gsm_plus_source(split: str) -> DataSource:
    return DataSource(
        repo="qintongli/GSM-Plus",
        splits=(split,),
        files=((f"gsm_plus/{split}.jsonl",), (f"gsm_plus/data/{split}-*.jsonl",)),
    )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark comes from and how it is read.

    Attributes:
        size: how many rows `read` makes of the whole.
        read: the sources' rows, one list for each, as rows for the task.
        sources: what to load.
    """

    size: int
    read: Callable[..., list[Row]]
    sources: tuple[DataSource, ...]


_SUBJECT_SIZES = (1187, 474, 479, 903, 540, 871, 546)

BENCHMARKS: dict[str, Benchmark] = {
    "gsm_plus": Benchmark(10_552, _gsm_plus, (_gsm_plus_source("test"),)),
    "gsm_plus_mini": Benchmark(2400, _gsm_plus, (_gsm_plus_source("testmini"),)),
    "math": Benchmark(5000, _math, (_math_source(SUBJECTS),)),
    **{
        f"math_{subject}": Benchmark(size, _math, (_math_source([subject]),))
        for subject, size in zip(SUBJECTS, _SUBJECT_SIZES, strict=True)
    },
    "math500": Benchmark(
        500,
        _math,
        (
            DataSource(
                repo="HuggingFaceH4/MATH-500", splits=("test",), files=(("math500/test.jsonl",),)
            ),
        ),
    ),
    "asdiv": Benchmark(
        2305,
        _asdiv,
        (
            DataSource(
                repo="EleutherAI/asdiv",
                splits=("validation",),
                files=(("asdiv/ASDiv.xml",), ("asdiv/asdiv/validation-*.parquet",)),
            ),
        ),
    ),
    "svamp": Benchmark(
        1000,
        _svamp,
        (
            DataSource(
                repo="ChilleD/SVAMP",
                splits=("train", "test"),
                files=(
                    ("svamp/SVAMP.json",),
                    ("svamp/data/train-*.parquet", "svamp/data/test-*.parquet"),
                ),
            ),
        ),
    ),
    "gsm8k": Benchmark(
        1319,
        _gsm8k,
        (
            DataSource(
                repo="openai/gsm8k",
                configs=("main",),
                splits=("test",),
                files=(("gsm8k/test.jsonl",), ("gsm8k/main/test-*.parquet",)),
            ),
        ),
    ),
    "dialogsum": Benchmark(
        500,
        _dialogsum,
        (
            DataSource(
                repo="knkarthick/dialogsum",
                splits=("test",),
                files=(("dialogsum/dialogsum.test.jsonl",), ("dialogsum/test.csv",)),
            ),
        ),
    ),
    "flores_asm_eng": Benchmark(
        1012, _flores, (_flores_source("asm_Beng"), _flores_source("eng_Latn"))
    ),
}
