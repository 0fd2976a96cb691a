"""What is set and not read by the method is known, so that it can be said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault

from axolotl_skd.config import Distillation
from axolotl_skd.config_blocks import RolloutConfig
from axolotl_skd.methods import METHODS
from axolotl_skd.preflight import ConfigConflictError, check_block_is_there, check_settings
from axolotl_skd.unread_keys import unread_keys, unread_rollout_keys

EVERYTHING = {
    "max_new_tokens": 7,
    "num_draft_tokens": 3,
    "student_top_p": 0.4,
    "teacher_top_p": 0.4,
    "stop_strings": ["END"],
    "teacher_top_k": 3,
}


def block(method: str, rollout: dict[str, Any] | None = None, **keys: Any) -> Distillation:
    return Distillation.model_validate(
        {"method": method, "teacher": {"base_model": "t"}, "rollout": rollout or {}, **keys}
    )


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_not_set(method: str) -> None:
    assert unread_keys(block(method)) == []


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("skd", []),
        ("mixed_skd", []),
        ("on_policy_kd", ["num_draft_tokens", "teacher_top_k", "teacher_top_p"]),
        ("gkd", ["num_draft_tokens", "teacher_top_k", "teacher_top_p"]),
        ("seqkd", ["num_draft_tokens", "teacher_top_k", "student_top_p"]),
        ("supervised_kd", list(EVERYTHING)),
    ],
)
def test_the_keys_of_a_rollout_that_a_method_does_not_make(
    method: str, expected: list[str]
) -> None:
    assert set(unread_keys(block(method, EVERYTHING))) == {f"rollout.{key}" for key in expected}
    assert set(expected) <= unread_rollout_keys(block(method)) <= RolloutConfig.model_fields.keys()


def test_the_keys_of_mixtures() -> None:
    assert unread_keys(block("skd", lmbda=0.9, switch_at=0.2)) == ["lmbda", "switch_at"]
    assert unread_keys(block("gkd", lmbda=0.9)) == []
    assert unread_keys(block("sft", on_non_finite="skip")) == ["on_non_finite"]
    assert unread_keys(block("seqkd", on_non_finite="skip")) == []
    assert unread_keys(block("two_stage", switch_at=0.2)) == []


def test_they_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_settings(DictDefault(base_model="s"), block("gkd", {"acceptance": "speculative"}))
    assert "method gkd does not read these keys" in caplog.text
    assert "rollout.acceptance" in caplog.text


@pytest.mark.parametrize("key", ["gate", "eval"])
def test_a_block_without_keys_is_no_absent_block(key: str) -> None:
    raw = {"distillation": {"method": "skd", key: None}}
    with pytest.raises(ConfigConflictError, match=f"distillation.{key}: is there, but has no keys"):
        check_block_is_there(raw)


@pytest.mark.parametrize(
    ("method", "key"), [("gkd", {"lmbda": 1}), ("two_stage", {"switch_at": 0})]
)
def test_cross_entropy_without_ground_truth_is_refused(method: str, key: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="nothing is trained on the data set"):
        block(method, loss={"ce_weight": 0.5}, **key)


def test_a_yes_is_no_k() -> None:
    with pytest.raises(ValueError, match="teacher_top_k"):
        block("skd", {"teacher_top_k": True})
