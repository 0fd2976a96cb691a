"""Small random models for drafting, as objects."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from axolotl_skd.draft_report.decoding import Decoding, forget_generation_settings, make_draft
from tests.rollout.tiny import tiny_model


def model(seed: int, vocab_size: int = 40, sharpness: float = 3.0) -> LlamaForCausalLM:
    return tiny_model("llama", seed, vocab_size=vocab_size, sharpness=sharpness)


def pair(num_draft_tokens: int = 3, vocab_size: int = 40) -> tuple[LlamaForCausalLM, ...]:
    """Teacher and student that agree often, not always: the student is the teacher with noise."""
    teacher, student = model(1, vocab_size), model(1, vocab_size)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.15 * parameter.std() * torch.randn_like(parameter))
    forget_generation_settings(teacher)
    make_draft(student, num_draft_tokens)
    return teacher, student


def decoding(temperature: float = 0.0, max_new_tokens: int = 24, **keys: object) -> Decoding:
    stops = keys.pop("stop_token_ids", (7, 19))
    return Decoding(
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stops,
        pad_token_id=0,
        **keys,
    )


@torch.no_grad()
def memoryless(probabilities: list[float]) -> LlamaForCausalLM:
    """A model whose next token has these probabilities, whatever came before.

    All embeddings are alike, so every position holds the same values and every hidden state is the
    same; the head is solved for it.
    """
    vocab_size = len(probabilities)
    lm = model(1, vocab_size)
    lm.get_input_embeddings().weight.copy_(torch.ones(vocab_size, lm.config.hidden_size))
    hidden = lm.get_decoder()(torch.tensor([[0, 1, 2]])).last_hidden_state[0, -1]
    logits = torch.tensor(probabilities).log()
    lm.get_output_embeddings().weight.copy_(torch.outer(logits, hidden) / hidden.dot(hidden))
    return lm
