"""What is missing for an evaluation is said before it, in one go."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml

from axolotl_skd.evaluation import needs
from axolotl_skd.evaluation.benchmarks import BENCHMARKS
from axolotl_skd.evaluation.data_sources import DataSource, DataUnavailableError
from axolotl_skd.evaluation.needs import (
    MissingForEvaluationError,
    check_backend,
    check_needs,
    fetch_from_hub,
    why_no_comet,
)
from axolotl_skd.evaluation.tasks import _TaskLoader, available_tasks, leaf_tasks
from axolotl_skd.resources import resource_path
from tests.evaluation.benchmark_files import write_releases


def test_every_task_reads_the_benchmark_of_its_name() -> None:
    for task in leaf_tasks(available_tasks()):
        if task != "skd_tiny_arithmetic":
            assert task.removeprefix("skd_") in BENCHMARKS
    for path in (resource_path("evals") / "skd_math").glob("*.yaml"):
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
        assert config["dataset_kwargs"]["benchmark"] == config["task"].removeprefix("skd_")


def test_local_files_are_looked_for_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKD_DATA_DIR", str(write_releases(tmp_path)))
    monkeypatch.setattr(DataSource, "load", lambda _: pytest.fail("read"))
    check_needs(available_tasks())
    assert fetch_from_hub(available_tasks()) == []
    (tmp_path / "svamp" / "SVAMP.json").unlink()
    (tmp_path / "flores" / "devtest" / "eng_Latn.devtest").unlink()
    check_needs(["skd_gsm8k", "skd_tiny_arithmetic"])
    with pytest.raises(MissingForEvaluationError) as caught:
        check_needs(["skd_paper"])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["skd_svamp", "skd_flores_asm_eng"]
    assert "Put one of these there: svamp/SVAMP.json" in lines[0]
    assert "eng_Latn" in lines[1]


def test_the_hub_is_asked_for_what_the_tasks_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKD_DATA_DIR", raising=False)
    loaded = []
    monkeypatch.setattr(DataSource, "load", lambda source: loaded.append(source.configs))
    repositories = fetch_from_hub(["skd_flores_asm_eng", "skd_gsm8k", "skd_tiny_arithmetic"])
    assert repositories == ["openlanguagedata/flores_plus", "openai/gsm8k"]
    assert loaded == [("asm_Beng",), ("eng_Latn",), ("main",)]

    def unreachable(source: DataSource) -> None:
        raise DataUnavailableError(source.repo)

    monkeypatch.setattr(DataSource, "load", unreachable)
    with pytest.raises(DataUnavailableError, match="openai/gsm8k"):
        fetch_from_hub(["skd_gsm8k"])


@pytest.mark.parametrize(
    ("package", "task"),
    [
        ("lm_eval", "skd_tiny_arithmetic"),
        ("math_verify", "skd_gsm8k"),
        ("rouge_score", "skd_dialogsum"),
        ("sacrebleu", "skd_flores_asm_eng"),
    ],
)
def test_missing_packages(package: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKD_DATA_DIR", raising=False)
    check_needs([task])
    find = needs.find_spec
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingForEvaluationError, match=rf"{package}: pip install 'axolotl-skd\["):
        check_needs([task])
    if package != "lm_eval":
        check_needs(["skd_tiny_arithmetic"])


def test_comet_is_asked_for_only_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert why_no_comet(["skd_math_heldout", "skd_dialogsum"]) is None
    assert "Unbabel/wmt22-comet-da" in why_no_comet(["skd_paper"])


def test_vllm_needs_its_packages_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend("hf")
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(MissingForEvaluationError, match="pip install vllm .*or use the backend hf"):
        check_backend("vllm")
    monkeypatch.setattr(needs, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingForEvaluationError, match="needs a GPU.*Use the backend hf"):
        check_backend("vllm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_backend("vllm")
