"""The benchmarks' rows from every layout that they come in, without lm-eval."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from axolotl_skd.evaluation import benchmarks
from axolotl_skd.evaluation.benchmarks import BENCHMARKS, BREAKDOWNS, SUBJECTS, load_benchmark
from axolotl_skd.evaluation.data_sources import DataSource, DataUnavailableError, read_rows
from tests.evaluation.benchmark_files import (
    ASDIV,
    DIALOGSUM,
    FLORES,
    GSM8K,
    GSM_PLUS,
    MATH,
    svamp_rows,
    write,
    write_jsonl,
    write_releases,
)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each benchmark makes of the authors' files."""
    folder = write_releases(tmp_path_factory.mktemp("releases"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKD_DATA_DIR", str(folder))
        return {name: load_benchmark(name) for name in BENCHMARKS}


def asdiv_rows() -> list[dict[str, str]]:
    names = ("body", "question", "solution_type", "answer")
    return [dict(zip(names, row, strict=True)) for row in ASDIV]


def dialogsum_rows() -> list[dict[str, str]]:
    """One row for each summary, as on the hub."""
    return [
        {
            "id": f"{row['fname']}_{n}",
            "dialogue": row["dialogue"],
            "summary": row[f"summary{n}"],
            "topic": row[f"topic{n}"],
        }
        for row in DIALOGSUM
        for n in (1, 2, 3)
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_hub_layout(folder: Path) -> None:
    shard = "-00000-of-00001.parquet"
    write_jsonl(folder / "gsm_plus" / "data" / "test-00000-of-00001.jsonl", GSM_PLUS)
    write_jsonl(folder / "gsm_plus" / "data" / "testmini-00000-of-00001.jsonl", GSM_PLUS[:2])
    for subject, row in MATH.items():
        write_parquet(folder / "math" / subject / f"test{shard}", [row])
        write_parquet(folder / "math" / subject / f"train{shard}", [row, row])
    # Two shards, to be read in their order.
    for n in range(2):
        name = f"validation-0000{n}-of-00002.parquet"
        write_parquet(folder / "asdiv" / "asdiv" / name, asdiv_rows()[2 * n : 2 * n + 2])
    write_parquet(folder / "svamp" / "data" / f"train{shard}", svamp_rows()[:2])
    write_parquet(folder / "svamp" / "data" / f"test{shard}", svamp_rows()[2:])
    write_parquet(folder / "gsm8k" / "main" / f"test{shard}", GSM8K)
    write_parquet(folder / "gsm8k" / "socratic" / f"test{shard}", GSM8K[:1])
    path = folder / "dialogsum" / "test.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "dialogue", "summary", "topic"])
        writer.writeheader()
        writer.writerows(dialogsum_rows())
    for language, sentences in FLORES.items():
        rows = [{"id": n, "text": text} for n, text in enumerate(sentences)]
        write_parquet(folder / "flores" / "devtest" / f"{language}.parquet", rows)


HUB_LAYOUT = sorted(set(BENCHMARKS) - {"math500"})  # whose hub file is the release's


@pytest.mark.parametrize("name", HUB_LAYOUT)
def test_the_hub_s_files_give_the_same_rows(
    name: str, releases: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_layout(tmp_path)
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    assert load_benchmark(name) == releases[name]


def hub(repo: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
    """A stand-in for `datasets.load_dataset`."""
    rows: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {
        ("qintongli/GSM-Plus", None, "test"): GSM_PLUS,
        ("qintongli/GSM-Plus", None, "testmini"): GSM_PLUS[:2],
        **{("EleutherAI/hendrycks_math", subject, "test"): [MATH[subject]] for subject in SUBJECTS},
        ("EleutherAI/asdiv", None, "validation"): asdiv_rows(),
        ("ChilleD/SVAMP", None, "train"): svamp_rows()[:2],
        ("ChilleD/SVAMP", None, "test"): svamp_rows()[2:],
        ("openai/gsm8k", "main", "test"): GSM8K,
        ("knkarthick/dialogsum", None, "test"): dialogsum_rows(),
        **{
            ("openlanguagedata/flores_plus", language, "devtest"): [
                {"text": text} for text in texts
            ]
            for language, texts in FLORES.items()
        },
    }
    return rows[repo, config, split]


@pytest.mark.parametrize("name", HUB_LAYOUT)
def test_the_hub_itself_gives_the_same_rows(
    name: str, releases: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKD_DATA_DIR", raising=False)
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_benchmark(name) == releases[name]


def test_the_rows(releases: dict) -> None:
    assert releases["asdiv"][1] == {
        "benchmark": "asdiv",
        "question": "Two sisters are 3 years apart. Their ages sum to 17.",
        "answer": "7; 10",
        "breakdown": ["acc_algebra_2"],
    }
    assert [row["answer"] for row in releases["asdiv"]] == ["7", "7; 10", "5", "-(1/3)"]
    assert releases["asdiv"][2]["breakdown"] == ["acc_subtraction"]
    # The full stop is added where it is missing, and only there.
    assert (
        releases["svamp"][0]["question"] == "Raj had 8 stamps. How many are left after 3 are gone?"
    )
    assert (
        releases["svamp"][1]["question"] == "Each of 4 nets has 2 balls. How many balls are there?"
    )
    assert [row["answer"] for row in releases["svamp"]] == ["5", "8", "2.5"]
    assert releases["gsm_plus"][7]["answer"] == "None"
    assert [row["answer"] for row in releases["gsm8k"]] == ["1,250", "2"]
    assert {row["answer"] for row in releases["math"]} == {r"\frac{1}{2}", "5"}
    assert releases["math"][1]["breakdown"] == ["acc_counting_and_probability", "acc_level_5"]
    assert releases["math500"][0]["breakdown"] == ["acc_number_theory", "acc_level_2"]
    assert [len(row["summaries"]) for row in releases["dialogsum"]] == [3, 3]
    assert releases["flores_asm_eng"][1] == {
        "source": FLORES["asm_Beng"][1],
        "reference": FLORES["eng_Latn"][1],
    }


def test_a_subject_alone_is_its_part_of_the_whole(releases: dict) -> None:
    together = [row for subject in SUBJECTS for row in releases[f"math_{subject}"]]
    assert together == releases["math"]
    assert sum(BENCHMARKS[f"math_{subject}"].size for subject in SUBJECTS) == 5000


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_files_name_both_ways(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    source = BENCHMARKS[name].sources[0]
    with pytest.raises(DataUnavailableError) as caught:
        load_benchmark(name)
    message = str(caught.value)
    assert str(tmp_path) in message and source.files[0][0] in message
    assert "unset SKD_DATA_DIR" in message and source.repo in message


def test_one_missing_subject_is_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_releases(tmp_path)
    (tmp_path / "math" / "test" / "algebra" / "1.json").unlink()
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    assert load_benchmark("math_geometry")
    with pytest.raises(DataUnavailableError, match="math/test/algebra"):
        load_benchmark("math")


def test_a_hub_that_cannot_be_reached_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.delenv("SKD_DATA_DIR", raising=False)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataUnavailableError) as caught:
        load_benchmark("gsm8k")
    for part in ("openai/gsm8k", "no route", "SKD_DATA_DIR", "gsm8k/test.jsonl"):
        assert part in str(caught.value)


def test_too_few_rows_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SKD_DATA_DIR", str(write_releases(tmp_path)))
    with caplog.at_level(logging.WARNING):
        load_benchmark("gsm8k")
    assert "gsm8k has 2 rows here instead of 1319" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", '{"a": 1}\n{'), ("rows.json", "["), ("rows.xml", "<a>"), ("x.parquet", "?")],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        ("gsm_plus", "gsm_plus/test.jsonl", {"perturbation_type": "new"}, "acc_new"),
        ("gsm8k", "gsm8k/test.jsonl", {"answer": "42"}, "no '####'"),
    ],
)
def test_a_row_that_does_not_belong_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    path: str,
    change: dict[str, str],
    message: str,
) -> None:
    write_releases(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]
    write_jsonl(tmp_path / path, [*rows[:-1], rows[-1] | change])
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_benchmark(name)


def test_flores_sentences_must_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_releases(tmp_path)
    write(tmp_path / "flores" / "devtest" / "eng_Latn.devtest", "Only one.\n")
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="2 Assamese and 1 English"):
        load_benchmark("flores_asm_eng")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{\frac12}$", r"\frac12"),
        (r"$\boxed{1}$, then $\boxed{2}$", "2"),
        (r"so $\boxed 5$.", "5"),
        (r"so $\fbox 5.$", "5"),
    ],
)
def test_the_reference_in_a_solution(solution: str, answer: str) -> None:
    assert benchmarks._boxed_reference(solution) == answer


def test_a_solution_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no boxed answer"):
        benchmarks._boxed_reference("so 5")


def test_a_level_that_is_not_known_counts_for_none() -> None:
    assert benchmarks._level("Level ?") == []
    assert benchmarks._level("Level 3") == benchmarks._level(3) == ["Level 3"]


def test_the_metrics_of_the_tasks_are_those_of_the_benchmarks() -> None:
    from axolotl_skd.resources import resource_path

    for name in ("gsm_plus", "math", "asdiv", "svamp"):
        text = (resource_path("evals") / "skd_math" / f"skd_{name}.yaml").read_text()
        for metric in BREAKDOWNS[name]:
            assert f"metric: {metric}, aggregation: !function utils.mean_of_known" in text


def test_a_source_prefers_the_first_way_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b.jsonl", '{"n": 2}\n')
    write(tmp_path / "a.jsonl", '{"n": 1}\n')
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    source = DataSource(
        repo="r", splits=("test",), files=(("a.jsonl", "gone"), ("b.jsonl",), ("a.jsonl",))
    )
    assert source.load() == [{"n": 2}]
