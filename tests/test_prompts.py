"""Prompts without completions: rendered as the same prompt with its completion would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl_skd.config import Distillation
from axolotl_skd.data import IGNORE_INDEX, completion_span
from axolotl_skd.preflight import ConfigConflictError, check_settings
from axolotl_skd.prompts import DATASET_TYPE

USER = {"role": "user", "content": "What is 2 plus 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
SYSTEM = {"role": "system", "content": "Be short."}
CFG = DictDefault(sequence_len=256, train_on_inputs=False, distillation={"method": "skd"})
MESSAGES = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
JINJA = MESSAGES + "{% if add_generation_prompt %}[{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        Path(__file__).parents[1] / "example_configs" / "tiny" / "teacher"
    )


def row(
    tokenizer: PreTrainedTokenizerBase, kind: str, row: dict[str, Any], **keys: Any
) -> dict[str, Any]:
    """Tokenised as Axolotl would, found by the name of its type."""
    return load(kind, tokenizer, CFG, DictDefault(path="x", type=kind, **keys)).tokenize_prompt(row)


@pytest.mark.parametrize("turns", [[USER], [SYSTEM, USER], [USER, ANSWER, USER]])
@pytest.mark.parametrize("answered", [True, False])
def test_the_prompt_is_that_of_the_row_with_an_answer(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], answered: bool
) -> None:
    whole = row(tokenizer, "chat_template", {"messages": [*turns, ANSWER]})
    start = completion_span(whole["labels"], whole["input_ids"], [tokenizer.eos_token_id]).start

    messages = [*turns, ANSWER] if answered else turns
    prompt = row(tokenizer, DATASET_TYPE, {"messages": messages})
    assert prompt["input_ids"] == [*whole["input_ids"][:start], tokenizer.eos_token_id]
    assert prompt["labels"] == [IGNORE_INDEX] * start + [tokenizer.eos_token_id]
    assert prompt["attention_mask"] == [1] * (start + 1)


def test_keys_of_the_data_set_and_the_config_are_honoured(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    keys = {"field_messages": "talk", "chat_template": "jinja"}
    keys["chat_template_jinja"] = JINJA
    keys["message_property_mappings"] = {"role": "from", "content": "value"}
    prompt = row(
        tokenizer, DATASET_TYPE, {"talk": [{"from": "human", "value": "2 plus 3?"}]}, **keys
    )
    assert tokenizer.decode(prompt["input_ids"][:-1]) == "[2 plus 3?]["


def test_tools_are_in_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    keys = {
        "chat_template": "jinja",
        "chat_template_jinja": "{{ (tools or [{}])[0]['name'] }}" + JINJA,
    }
    prompt = row(tokenizer, DATASET_TYPE, {"messages": [USER], "tools": [{"name": "sum"}]}, **keys)
    assert tokenizer.decode(prompt["input_ids"][:-1]).startswith("sum[")


def test_a_template_that_does_not_say_where_answers_begin_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    keys = {"chat_template": "jinja", "chat_template_jinja": template}
    with pytest.raises(ValueError, match="ignores add_generation_prompt"):
        row(tokenizer, DATASET_TYPE, {"messages": [USER]}, **keys)
    # Without a header there is nothing to say.
    keys["chat_template_jinja"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row(tokenizer, DATASET_TYPE, {"messages": [USER]}, **keys)


def test_without_distillation_nothing_would_replace_the_stand_ins(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(ValueError, match="plain fine-tuning would train on the end-of-sequence"):
        load(DATASET_TYPE, tokenizer, DictDefault(sequence_len=256), DictDefault(path="x"))


@pytest.mark.parametrize("messages", [[], None, [ANSWER]])
def test_a_row_with_nothing_to_answer_is_refused(
    tokenizer: PreTrainedTokenizerBase, messages: Any
) -> None:
    with pytest.raises(ValueError, match="no turn to be answered in 'messages'"):
        row(tokenizer, DATASET_TYPE, {"messages": messages})


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="needs an EOS token"):
        load(DATASET_TYPE, Endless(), CFG, DictDefault(path="x", type=DATASET_TYPE))


PROMPTS = {"path": "x", "type": DATASET_TYPE}
CHAT = {"path": "y", "type": "chat_template"}


def settings(method: str, **keys: Any) -> tuple[DictDefault, Distillation]:
    block = Distillation.model_validate({"method": method, "teacher": {"base_model": "t"}})
    return DictDefault({"base_model": "s", "datasets": [PROMPTS], **keys}), block


@pytest.mark.parametrize("method", ["skd", "on_policy_kd", "seqkd"])
@pytest.mark.parametrize("keys", [{}, {"val_set_size": 0.0, "test_datasets": [CHAT]}])
def test_methods_that_sample_everything_take_prompts(method: str, keys: dict[str, Any]) -> None:
    check_settings(*settings(method, **keys))


@pytest.mark.parametrize(
    "method", ["sft", "supervised_kd", "speckd", "imitkd", "gkd", "mixed_skd", "two_stage"]
)
def test_methods_that_train_on_completions_refuse_prompts(method: str) -> None:
    with pytest.raises(ConfigConflictError, match=f"method '{method}' trains on the data set's"):
        check_settings(*settings(method, datasets=[CHAT, PROMPTS]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"val_set_size": 0.1}, "val_set_size: 0.1 splits"),
        ({"test_datasets": [CHAT, PROMPTS]}, "test_datasets: type .* without completions"),
    ],
)
def test_validation_on_prompts_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigConflictError, match=message):
        check_settings(*settings("skd", **keys))
