"""Padded vocabularies are cut to one width, which changes nothing in the rows that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axolotl_skd.config_blocks import TeacherConfig
from axolotl_skd.draft_report.decoding import decode, forget_generation_settings, make_draft
from axolotl_skd.draft_report.widths import cut_to_one_width, grow_to, head_width
from axolotl_skd.teacher import load_teacher
from tests.draft_report.pairs import decoding, model
from tests.helpers import save_model
from tests.rollout.tiny import tiny_model

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_the_wider_is_cut_and_the_logits_stay(tied: bool) -> None:
    wide = tiny_model("llama", 1, vocab_size=48, tie_word_embeddings=tied)
    narrow = tiny_model("llama", 2, vocab_size=40, tie_word_embeddings=tied)
    before, kept = wide(IDS).logits, narrow(IDS).logits
    assert cut_to_one_width([wide, narrow]) == 40
    assert head_width(wide) == head_width(narrow) == 40
    assert wide.config.vocab_size == narrow.config.vocab_size == 40
    torch.testing.assert_close(wide(IDS).logits, before[..., :40], rtol=1e-6, atol=1e-6)
    assert torch.equal(narrow(IDS).logits, kept)
    if tied:
        assert wide.get_input_embeddings().weight is wide.get_output_embeddings().weight


@pytest.mark.parametrize(("teacher_size", "student_size"), [(48, 40), (40, 48)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pair_of_two_widths_can_be_decoded(
    teacher_size: int, student_size: int, temperature: float
) -> None:
    teacher, student = model(1, teacher_size), model(2, student_size)
    forget_generation_settings(teacher)
    make_draft(student, 3)
    with pytest.raises(ValueError, match="different tokenizers"):  # or this room is not needed
        decode(teacher, student, [3, 4], decoding(temperature), seed=0)
    cut_to_one_width([teacher, student])
    completion = decode(teacher, student, [3, 4], decoding(temperature), seed=0)
    assert max(completion.ids) < 40


@torch.no_grad()
@pytest.mark.parametrize("quantisation", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_quantised_teacher_is_cut_as_well(quantisation: dict[str, bool], tmp_path: Path) -> None:
    save_model(tmp_path, vocab_size=96, hidden_size=64, intermediate_size=128)
    config = TeacherConfig(base_model=str(tmp_path), dtype="float32", **quantisation)
    teacher = load_teacher(config, torch.device("cpu"))
    before = teacher(IDS).logits
    assert cut_to_one_width([teacher, model(2, 64)]) == 64
    torch.testing.assert_close(teacher(IDS).logits, before[..., :64], rtol=1e-4, atol=1e-4)


def test_growing_adds_rows_and_never_takes_any() -> None:
    lm = model(1, 40)
    grow_to(lm, 36)
    assert head_width(lm) == 40
    grow_to(lm, 44)
    assert head_width(lm) == 44
