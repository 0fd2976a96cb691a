"""Chat templates through Axolotl's own tokenising: the completion is the answer and its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from axolotl_skd.trainer import DistillationTrainer
from tests.training.harness import TOKENIZER, base_config, run_training

# As Phi-3's: an end-of-turn token, a new line, and an EOS behind the whole conversation.
EOS_BEHIND = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ANSWER = "It is four."


@pytest.mark.parametrize("eot_tokens", [None, ["<|im_end|>"]])
def test_an_eos_behind_the_conversation_is_not_taken_for_the_answer(
    pair: Path, tmp_path: Path, eot_tokens: list[str] | None
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "teacher").symlink_to(pair / "teacher")
    (folder / "student").mkdir()
    for file in (pair / "student").iterdir():
        (folder / "student" / file.name).symlink_to(file)
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": ANSWER}]
    (folder / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    batches: list[dict[str, Any]] = []

    def watch(trainer: DistillationTrainer) -> None:
        source = trainer.distiller.source
        complete = source.complete

        def watched(window: Any, *args: Any) -> Any:
            batches.extend(window)
            return complete(window, *args)

        source.complete = watched

    config = base_config(folder, method="supervised_kd", max_steps=1, eot_tokens=eot_tokens)
    config["chat_template"] = "jinja"
    config["chat_template_jinja"] = EOS_BEHIND
    config["special_tokens"] = {"eos_token": "<|pad|>"}  # another token than the end of turn
    run_training(config, tmp_path / "out", watch)
    row = batches[0]
    start = int(row["prompt_lengths"][0])
    completion = row["labels"][0][row["labels"][0] != -100].tolist()
    assert tokenizer.decode(row["input_ids"][0][:start]).endswith("<|im_start|>assistant\n")
    text = tokenizer.decode(completion)
    assert text == ANSWER + ("<|im_end|>" if eot_tokens else "")
