"""Families with sliding windows: right up to the bound that is given, whatever the teacher's window."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from axolotl_skd.draft_report import windows
from axolotl_skd.draft_report.decoding import decode, forget_generation_settings, make_draft
from axolotl_skd.draft_report.windows import draft_window
from tests.draft_report.naive import naive_greedy
from tests.draft_report.pairs import decoding
from tests.rollout.tiny import WINDOW, one_thread, tiny_model

SLIDING = ("qwen2_window", "gemma2", "gemma3", "mistral", "phi3")
PROMPT = [1, 2, 3, 4]


def family_pair(teacher: str, student: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    models = [tiny_model(name, 1, num_layers=3, sharpness=3.0) for name in (teacher, student)]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in models[1].parameters():
            if parameter.numel() > 1:
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    forget_generation_settings(models[0])
    make_draft(models[1], 4)
    return models[0], models[1]


def check(teacher: PreTrainedModel, student: PreTrainedModel, max_new_tokens: int) -> None:
    how = decoding(max_new_tokens=max_new_tokens, stop_token_ids=(299,))
    ids, counts = naive_greedy(teacher, student, PROMPT, 4, how)
    completion = decode(teacher, student, PROMPT, how, seed=0)
    assert list(completion.ids) == ids
    assert completion.counts == counts


@pytest.mark.parametrize("family", SLIDING)
def test_a_draft_is_right_up_to_its_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = family_pair(family, family)
    monkeypatch.setattr(windows, "rolls_back_windows", lambda: False)
    assert draft_window(student) == WINDOW
    with one_thread():
        check(teacher, student, WINDOW - len(PROMPT))


@pytest.mark.parametrize("family", SLIDING)
def test_a_teacher_is_right_beyond_its_window(family: str) -> None:
    teacher, student = family_pair(family, "llama")
    assert draft_window(student) is None
    with one_thread():
        check(teacher, student, 2 * WINDOW)


def test_a_release_with_the_fix_has_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "rolls_back_windows", lambda: True)
    assert draft_window(tiny_model("mistral", 1)) is None


def test_the_probe_says_what_drafting_beyond_the_window_does() -> None:
    teacher, student = family_pair("mistral", "mistral")
    try:
        check(teacher, student, 2 * WINDOW)
        right = True
    except (RuntimeError, AssertionError):
        right = False
    assert windows.rolls_back_windows() is right
