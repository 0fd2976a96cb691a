"""When the student is evaluated, what is kept from before, and what a failure costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from axolotl_skd import before_after
from axolotl_skd.before_after import evaluate_end, evaluate_start, start_scores
from axolotl_skd.config_blocks import EvalConfig
from axolotl_skd.evaluation.models import EvalModel, EvalSettings
from axolotl_skd.evaluation.runner import EvaluationError
from tests.helpers import save_tokenizer

TASK, OTHER = "skd_tiny_arithmetic", "skd_gsm8k"


class Runs:
    """In place of lm-eval: keeps what was run, and scores each run one higher."""

    def __init__(self) -> None:
        self.made: list[tuple[EvalModel, EvalSettings, list[str]]] = []
        self.error: Exception | None = None

    def __call__(self, model: EvalModel, settings: EvalSettings, *, tasks: Any) -> dict:
        self.made.append((model, settings, list(tasks)))
        if self.error is not None:
            raise self.error
        return {task: {"acc": len(self.made) / 10} for task in tasks}

    @property
    def tasks(self) -> list[list[str]]:
        return [tasks for _, _, tasks in self.made]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.delenv("RANK", raising=False)
    fake = Runs()
    monkeypatch.setattr(before_after, "run_tasks", fake)
    return fake


@pytest.fixture
def cfg(tmp_path: Path) -> dict[str, Any]:
    save_tokenizer(tmp_path / "student")
    return {
        "base_model": str(tmp_path / "student"),
        "output_dir": str(tmp_path / "out"),
        "device": "cuda:0",
        "axolotl_config_path": "my config.yml",
    }


def settings(*tasks: str, **keys: Any) -> EvalConfig:
    return EvalConfig(tasks=tasks or (TASK,), **keys)


def start(cfg: dict[str, Any], config: EvalConfig) -> None:
    evaluate_start(cfg, config, AutoTokenizer.from_pretrained(cfg["base_model"]))


def recorded(cfg: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(cfg["output_dir"]) / "eval_results.json").read_text())


def test_before_and_after_in_one_file(
    runs: Runs, cfg: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(limit=3, batch_size=5, apply_chat_template=False)
    start(cfg, config)
    assert start_scores(cfg, config) == {TASK: {"acc": 0.1}}
    assert evaluate_end(cfg, config) == {TASK: {"acc": 0.2}}
    assert recorded(cfg) == {"start": {TASK: {"acc": 0.1}}, "end": {TASK: {"acc": 0.2}}}
    assert "10.0%" in (printed := capsys.readouterr().out) and "+10.0" in printed
    assert "not comparable" not in printed
    used = EvalSettings(limit=3, batch_size=5, apply_chat_template=False)
    assert [item[1] for item in runs.made] == [used, used]
    assert [item[0] for item in runs.made] == [
        EvalModel(base_model=model, tokenizer=cfg["output_dir"], device="cuda:0")
        for model in (cfg["base_model"], cfg["output_dir"])
    ]


def test_an_adapter_is_evaluated_on_its_base_model(runs: Runs, cfg: dict[str, Any]) -> None:
    cfg.update(adapter="lora", revision_of_model="v2", trust_remote_code=True)
    start(cfg, settings())
    evaluate_end(cfg, settings())
    untrained, trained = (item[0] for item in runs.made)
    assert untrained.adapter is None and trained.adapter == cfg["output_dir"]
    for model in (untrained, trained):
        assert (model.base_model, model.revision) == (cfg["base_model"], "v2")
        assert model.trust_remote_code


def test_a_full_model_has_no_revision_of_the_hub(runs: Runs, cfg: dict[str, Any]) -> None:
    start(cfg, settings())
    evaluate_end({**cfg, "revision_of_model": "v2"}, settings())
    assert runs.made[-1][0].revision is None


@pytest.mark.parametrize(("at", "count"), [(("start",), 1), (("end",), 1), (("start", "end"), 2)])
def test_only_where_asked(runs: Runs, cfg: dict[str, Any], at: tuple[str, ...], count: int) -> None:
    config = settings(at=at)
    save_tokenizer(Path(cfg["output_dir"]))
    start(cfg, config)
    evaluate_end(cfg, config)
    assert len(runs.made) == count
    assert set(recorded(cfg)) == set(at)
    assert bool(start_scores(cfg, config)) == ("start" in at)


def test_only_the_first_rank(
    runs: Runs, cfg: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    start(cfg, settings())
    assert evaluate_end(cfg, settings()) is None
    assert runs.made == [] and not Path(cfg["output_dir"]).exists()


# Resuming


@pytest.fixture
def resumed(runs: Runs, cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that goes on, after its start was evaluated."""
    start(cfg, settings(TASK, OTHER))
    return {**cfg, "resume_from_checkpoint": "checkpoint-1"}


def test_a_new_run_starts_afresh(runs: Runs, cfg: dict[str, Any]) -> None:
    start(cfg, settings(TASK, OTHER))
    evaluate_end(cfg, settings())
    start(cfg, settings())
    assert recorded(cfg) == {"start": {TASK: {"acc": 0.3}}}
    start(cfg, settings(at=["end"]))
    assert not (Path(cfg["output_dir"]) / "eval_results.json").exists()


def test_a_resumed_run_does_not_repeat_its_start(runs: Runs, resumed: dict[str, Any]) -> None:
    start(resumed, settings(TASK, OTHER))
    start(resumed, settings(OTHER, at=["start"]))
    assert runs.tasks == [[TASK, OTHER]]


def test_a_resumed_run_forgets_its_end(runs: Runs, resumed: dict[str, Any]) -> None:
    """Were its own to fail, the former model's would stand for it."""
    evaluate_end(resumed, settings())
    start(resumed, settings())
    assert recorded(resumed) == {"start": {TASK: {"acc": 0.1}, OTHER: {"acc": 0.1}}}
    beside = Path(resumed["output_dir"], "eval_settings.json")
    assert json.loads(beside.read_text()).keys() == {"start"}


def test_checkpoints_count_as_resuming_only_if_they_are_used(
    runs: Runs, cfg: dict[str, Any]
) -> None:
    """`checkpoints.choose_checkpoint` has settled which; half-written ones are not used."""
    start(cfg, settings())
    (Path(cfg["output_dir"]) / "checkpoint-3").mkdir()
    start({**cfg, "resume_from_checkpoint": "checkpoint-3"}, settings())
    assert len(runs.made) == 1
    start(cfg, settings())
    assert len(runs.made) == 2


def test_only_what_is_missing_is_run(runs: Runs, resumed: dict[str, Any]) -> None:
    start(resumed, settings(TASK, "skd_svamp"))
    assert runs.tasks[1:] == [["skd_svamp"]]
    assert recorded(resumed)["start"] == {
        TASK: {"acc": 0.1},
        OTHER: {"acc": 0.1},
        "skd_svamp": {"acc": 0.2},
    }


@pytest.mark.parametrize(
    "change", [{"limit": 5}, {"batch_size": 3}, {"apply_chat_template": False}, {"backend": "vllm"}]
)
def test_a_result_of_other_settings_is_no_result(
    runs: Runs, resumed: dict[str, Any], change: dict[str, Any]
) -> None:
    start(resumed, settings(TASK, **change))
    assert runs.tasks[1:] == [[TASK]]
    assert recorded(resumed)["start"][TASK] == {"acc": 0.2}
    start(resumed, settings(TASK, **change))
    start(resumed, settings(OTHER))
    assert len(runs.made) == 2


def test_a_result_of_another_model_template_or_data_is_no_result(
    runs: Runs, resumed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start({**resumed, "lora_model_dir": "some/adapter"}, settings())
    assert len(runs.made) == 2 and runs.made[-1][0].adapter == "some/adapter"
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    start(resumed, settings())
    assert len(runs.made) == 3
    tokenizer = AutoTokenizer.from_pretrained(resumed["base_model"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for _ in range(2):
        evaluate_start(resumed, settings(), tokenizer)
    assert len(runs.made) == 4


def test_where_data_lie_is_nothing_to_a_task_without_data(
    runs: Runs, cfg: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(cfg, settings("skd_tiny_arithmetic", "skd_svamp"))
    monkeypatch.setenv("SKD_DATA_DIR", str(tmp_path))
    resumed = {**cfg, "resume_from_checkpoint": "checkpoint-1"}
    start(resumed, settings("skd_tiny_arithmetic", "skd_svamp"))
    assert runs.tasks[1:] == [["skd_svamp"]]


def test_a_group_counts_with_all_its_members(runs: Runs, cfg: dict[str, Any]) -> None:
    start(cfg, settings("skd_math_heldout"))
    resumed = {**cfg, "resume_from_checkpoint": "checkpoint-1"}
    start(resumed, settings("skd_math_heldout"))
    start(resumed, settings("skd_svamp"))
    assert len(runs.made) == 1
    start(resumed, settings("skd_svamp", limit=2))
    start(resumed, settings("skd_math_heldout"))
    assert runs.tasks[1:] == [["skd_svamp"], ["skd_math_heldout"]]


# Failures


def test_a_failure_before_training_stops_with_what_to_do(runs: Runs, cfg: dict[str, Any]) -> None:
    runs.error = EvaluationError("out of memory")
    with pytest.raises(
        EvaluationError, match=r"(?s)out of memory.*nothing has been trained.*end\]"
    ):
        start(cfg, settings())


def test_a_broken_results_file_is_refused_before_the_work(
    runs: Runs, resumed: dict[str, Any]
) -> None:
    (Path(resumed["output_dir"]) / "eval_results.json").write_text("{")
    with pytest.raises(ValueError, match="move it away"):
        start(resumed, settings(TASK, OTHER))
    assert len(runs.made) == 1


def test_a_broken_results_file_is_found_before_the_work_after_training_too(
    runs: Runs, cfg: dict[str, Any]
) -> None:
    save_tokenizer(Path(cfg["output_dir"]))
    (Path(cfg["output_dir"]) / "eval_results.json").write_text("{")
    assert evaluate_end(cfg, settings()) is None
    assert runs.made == []


@pytest.mark.parametrize("error", [EvaluationError("out of memory"), OSError("disk full")])
def test_a_failure_after_training_is_logged_with_the_command(
    runs: Runs, cfg: dict[str, Any], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(cfg, settings())
    logged = []
    monkeypatch.setattr(
        before_after.LOG, "error", lambda text, *args, **_: logged.append(text % args)
    )
    runs.error = error
    assert evaluate_end(cfg, settings()) is None
    (message,) = logged
    assert str(error) in message and f"is safe in {cfg['output_dir']}" in message
    assert f"axolotl skd eval 'my config.yml' --output-dir {cfg['output_dir']}" in message
    assert recorded(cfg) == {"start": {TASK: {"acc": 0.1}}}
