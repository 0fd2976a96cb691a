"""One vocabulary width for teacher and students.

Assisted generation takes models of different widths for models of different tokenizers, and
checkpoints pad theirs differently (Qwen2: 151,936 and 152,064).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel


def head_width(model: PreTrainedModel) -> int:
    """Rows of the output head, padding included."""
    return model.get_output_embeddings().weight.shape[0]


def grow_to(model: PreTrainedModel, size: int) -> None:
    """Add rows, in memory, for tokens that the config adds to the tokenizer, as training does."""
    if head_width(model) < size:
        model.resize_token_embeddings(size)


def cut_to_one_width(models: Sequence[PreTrainedModel]) -> int:
    """Cut embeddings and heads, in memory, to the narrowest, as training cuts the distributions.

    Returns:
        the common width.
    """
    size = min(head_width(model) for model in models)
    for model in models:
        if head_width(model) > size:
            model.resize_token_embeddings(size)
    return size
