"""The bundled tasks in lm-eval itself, offline, on hand-written rows and a model of fixed answers.

`.ci/run` runs this file with two versions of lm-eval.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from axolotl_skd.evaluation.benchmarks import BREAKDOWNS, SUBJECTS
from axolotl_skd.evaluation.rouge import rouge_scores
from axolotl_skd.evaluation.tasks import available_tasks
from axolotl_skd.resources import resource_path
from tests.evaluation.benchmark_files import (
    DIALOGSUM,
    FLORES,
    GSM8K,
    GSM_PLUS,
    RESPONSES,
    write_releases,
)

MATH_PROMPT = (
    "Solve the following math problem step-by-step.\nSimplify your answer as much as possible. "
    "Present your final answer as \\boxed{Your Answer}.\n"
)
MATH_STOPS = ["\nSolve the following math problem step-by-step.", "\n\n\n\n"]


class FixedAnswers(LM):
    """Answers the question that a prompt holds, and keeps what it was asked."""

    tokenizer_name = "fixed"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[list[dict[str, str]], dict[str, Any]]] = []

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        responses = []
        for prompt, options in (request.args for request in requests):
            chat = json.loads(prompt)
            self.asked.append((chat, options))
            # The longest, because one question may be the beginning of another.
            known = [question for question in RESPONSES if question in chat[-1]["content"]]
            responses.append(RESPONSES[max(known, key=len)])
        return responses

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        assert add_generation_prompt
        return json.dumps(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "fixed"

    def loglikelihood(self, requests: list) -> list:
        raise AssertionError("no bundled task asks for likelihoods")

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(resource_path("evals")), include_defaults=False)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_releases(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(manager: TaskManager, data_dir: Path) -> tuple[dict[str, Any], FixedAnswers]:
    """All tasks of the paper, and the others, evaluated once."""
    model = FixedAnswers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKD_DATA_DIR", str(data_dir))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("SKD_COMET_CHECKPOINT", raising=False)
        patch.setenv("HF_HUB_CACHE", str(data_dir / "no_hub"))
        results = simple_evaluate(
            model=model,
            tasks=["skd_paper", "skd_gsm_plus_mini", "skd_math500", "skd_math_geometry"],
            task_manager=manager,
            apply_chat_template=True,
            log_samples=True,
            bootstrap_iters=0,
        )
    return results, model


def metrics(run: tuple[dict[str, Any], FixedAnswers], task: str) -> dict[str, float]:
    return {
        key.partition(",")[0]: value
        for key, value in run[0]["results"][task].items()
        if "," in key and "_stderr" not in key
    }


def samples(run: tuple[dict[str, Any], FixedAnswers], task: str) -> list[dict[str, Any]]:
    return sorted(run[0]["samples"][task], key=lambda sample: sample["doc_id"])


def asked(run: tuple[dict[str, Any], FixedAnswers], text: str) -> tuple[str, dict[str, Any]]:
    """The user's turn that holds `text`, and the decoding options of the request."""
    chat, options = next(item for item in run[1].asked if text in item[0][-1]["content"])
    assert [turn["role"] for turn in chat] == ["user"]
    return chat[0]["content"], options


def test_lm_eval_knows_every_bundled_task_and_group(manager: TaskManager) -> None:
    assert set(available_tasks()) == set(manager.all_tasks)
    assert {"skd_math_heldout", "skd_paper"} <= set(manager.all_groups)


def test_gsm_plus_per_perturbation_type(run: tuple) -> None:
    measured = metrics(run, "skd_gsm_plus")
    assert measured["acc"] == 6 / 8 and measured["has_answer"] == 1
    assert measured["acc_digit_expansion"] == measured["acc_critical_thinking"] == 0
    assert measured["acc_adding_operation"] == 1
    assert {"acc", "has_answer", *BREAKDOWNS["gsm_plus"]} == set(measured)
    assert metrics(run, "skd_gsm_plus_mini")["acc"] == 1 / 2


def test_math_per_subject_and_level(run: tuple) -> None:
    measured = metrics(run, "skd_math")
    assert measured["acc"] == pytest.approx(6 / 7)
    assert measured["has_answer"] == pytest.approx(6 / 7)
    assert measured["acc_algebra"] == 0
    assert all(measured[f"acc_{subject}"] == 1 for subject in SUBJECTS[1:])
    # Level 4 has algebra and prealgebra.
    assert [measured[f"acc_level_{level}"] for level in range(1, 6)] == [1, 1, 1, 0.5, 1]
    assert metrics(run, "skd_math_geometry")["acc"] == 1
    assert len(samples(run, "skd_math_geometry")) == 1
    assert metrics(run, "skd_math500")["acc_level_2"] == 1


def test_asdiv_and_svamp_per_type(run: tuple) -> None:
    asdiv, svamp = metrics(run, "skd_asdiv"), metrics(run, "skd_svamp")
    assert asdiv["acc"] == 3 / 4 and asdiv["has_answer"] == 3 / 4
    assert asdiv["acc_subtraction"] == 0 and asdiv["acc_algebra_2"] == 1
    assert math.isnan(asdiv["acc_gcd"])
    assert svamp["acc"] == pytest.approx(2 / 3)
    assert svamp["acc_multiplication"] == 0 and svamp["acc_common_division"] == 1


def test_gsm8k(run: tuple) -> None:
    assert metrics(run, "skd_gsm8k") == {"acc": 0.5, "has_answer": 0.5}


def test_dialogsum_is_the_mean_over_references_and_rows(run: tuple) -> None:
    references = [DIALOGSUM[0][f"summary{n}"] for n in (1, 2, 3)]
    expected = rouge_scores(RESPONSES[DIALOGSUM[0]["dialogue"]], references)
    for name, value in metrics(run, "skd_dialogsum").items():
        assert value == pytest.approx(expected[name] / 2)


def test_flores_has_chrf_although_comet_is_missing(run: tuple) -> None:
    measured = metrics(run, "skd_flores_asm_eng")
    assert math.isnan(measured["comet"])
    assert 50 < measured["chrf"] < 100


def test_the_held_out_group_is_the_plain_mean_of_its_four(run: tuple) -> None:
    four = ["skd_math", "skd_gsm_plus", "skd_asdiv", "skd_svamp"]
    expected = sum(metrics(run, task)["acc"] for task in four) / 4
    assert metrics(run, "skd_math_heldout")["acc"] == pytest.approx(expected)


def test_the_prompts_and_decoding_of_the_paper(run: tuple) -> None:
    greedy = {"do_sample": False, "repetition_penalty": 1.0}
    question = GSM_PLUS[0]["question"]
    assert asked(run, question) == (
        MATH_PROMPT + question,
        {"until": MATH_STOPS, "max_gen_toks": 1024, **greedy},
    )
    question = GSM8K[0]["question"]
    assert asked(run, question) == (
        f"Q: {question} \n\nA:",
        {"until": ["\n\n"], "max_gen_toks": 512, **greedy},
    )
    dialogue = DIALOGSUM[0]["dialogue"]
    assert asked(run, dialogue) == (
        dialogue,
        {"until": ["\nuser", "\n"], "max_gen_toks": 128, **greedy},
    )
    source = FLORES["asm_Beng"][0]
    assert asked(run, source) == (
        "Translate Assamese sentence into English. This is the Assamese sentence: "
        f"{source}. Here is the English translation:",
        {"until": ["\n"], "max_gen_toks": 256, **greedy},
    )


def test_the_samples_hold_extracted_answer_and_verdict(run: tuple) -> None:
    first, second = samples(run, "skd_gsm_plus")[:2]
    assert first["filtered_resps"] == ["12"] and first["acc"] == 1 and first["target"] == "12"
    assert second["filtered_resps"] == ["5"] and second["acc"] == 0
    unanswered = samples(run, "skd_gsm8k")[1]
    assert unanswered["filtered_resps"] == [""] and unanswered["has_answer"] == 0


def test_every_row_has_the_same_metrics_in_the_same_order(run: tuple) -> None:
    # Several processes gather them one by one, by position.
    for task in run[0]["samples"]:
        assert len({tuple(sample["metrics"]) for sample in samples(run, task)}) == 1
