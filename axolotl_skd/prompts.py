"""Data sets of prompts without completions: `type: axolotl_skd.prompts` in Axolotl's `datasets:`.

Axolotl drops rows in which nothing is trained on, and finds out where an answer begins by looking for
it. So a prompt is rendered up to where the answer would begin, and an end-of-sequence token stands in
the answer's place: a completion that is rolled out replaces it, and nothing else may train on it
(`preflight.check_prompts_only`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.prompt_strategies import chat_template
from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from axolotl_skd.data import IGNORE_INDEX

DATASET_TYPE = __name__
"""What a data set's `type:` is called in an Axolotl config."""


class PromptsOnlyStrategy(PromptTokenizingStrategy):
    """Renders a conversation up to the answer, with the chat template's header of an answer."""

    def __init__(self, turns: chat_template.ChatTemplateStrategy) -> None:
        """
        Args:
            turns: Axolotl's own strategy, which reads the rows and knows the template.
        """
        super().__init__(turns.prompter, turns.tokenizer, turns.train_on_inputs, turns.sequence_len)
        self._turns = turns

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, list[int]]:
        """A row of chat turns -> input_ids, attention_mask, labels: the prompt and a stand-in.

        An answer at the end of the row is left out.

        Raises:
            ValueError: nothing is left to be answered.
        """
        field = self.prompter.field_messages
        turns = self._turns.get_conversation_thread(dict(prompt)) if prompt.get(field) else []
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            raise ValueError(
                f"datasets: a row of type {DATASET_TYPE} has no turn to be answered in {field!r}: got "
                f"{prompt.get(field)!r}. Give each row a user turn, or name the column by "
                "field_messages."
            )
        tools = self._turns._get_tools(dict(prompt))
        ids = self.prompter.build_prompt(turns, add_generation_prompt=True, tools=tools)
        return {
            "input_ids": [*ids, self.tokenizer.eos_token_id],
            "attention_mask": [1] * (len(ids) + 1),
            "labels": [IGNORE_INDEX] * len(ids) + [self.tokenizer.eos_token_id],
        }


def load(
    tokenizer: PreTrainedTokenizerBase,
    cfg: Mapping[str, Any],
    ds_cfg: Mapping[str, Any] | BaseModel | None = None,
) -> PromptsOnlyStrategy:
    """Axolotl's hook for a data set's `type:`. Takes all keys that `type: chat_template` takes.

    Raises:
        ValueError: nothing would replace the stand-ins, the tokenizer has no EOS token to stand in, or
            the template does not say where an answer begins.
    """
    if cfg.get("distillation") is None:
        raise ValueError(
            f"datasets: type {DATASET_TYPE} has prompts without completions, and plain fine-tuning "
            "would train on the end-of-sequence tokens that stand in for them. Add plugins: "
            "[axolotl_skd.SKDPlugin] and a distillation: block, or use type: chat_template."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"datasets: type {DATASET_TYPE} needs an EOS token, which stands in for the completions, "
            "but the tokenizer has none. Set special_tokens: {eos_token: ...}."
        )
    given = ds_cfg.model_dump() if isinstance(ds_cfg, BaseModel) else dict(ds_cfg or {})
    if not given.get("chat_template") and not cfg.get("chat_template"):
        given["chat_template"] = "tokenizer_default"  # as of `type: chat_template`
    turns = chat_template.load(tokenizer, cfg, given)
    _check_template(turns.prompter)
    return PromptsOnlyStrategy(turns)


def _check_template(prompter: chat_template.ChatTemplatePrompter) -> None:
    """Refuse a template that writes a header before answers but not where an answer is asked for."""
    user = {"role": "user", "content": "0"}
    bare = prompter.build_prompt_text([user])
    whole = prompter.build_prompt_text([user, {"role": "assistant", "content": "1"}])
    headed = not whole.removeprefix(bare).lstrip().startswith("1")
    if headed and prompter.build_prompt(
        [user], add_generation_prompt=True
    ) == prompter.build_prompt([user]):
        raise ValueError(
            f"datasets: type {DATASET_TYPE} ends prompts where an answer would begin, but the chat "
            f"template ignores add_generation_prompt: it gives {bare!r}, and with an answer "
            f"{whole!r}. Use a chat_template with a generation prompt."
        )
