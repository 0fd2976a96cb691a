"""Strings that end a completion, found in its decoded text.

A row ends at the first token after which the decoded completion contains one of the strings. Every
token is looked at with what stands before it alone, so the draft length cannot matter. Only the last
tokens are decoded: as many as the longest string has bytes, since a token writes at least one, and a
few more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

# Tokens decoded beyond those: for what decoders do at the start of a text (a space left out, the rest
# of a character), and for tokens inside a string that write nothing.
_MARGIN = 8


class StopStrings:
    """Where a completion ends by its text."""

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        """
        Args:
            strings: any of them ends a completion; none empty.
            decode: token ids -> text, special tokens included.
        """
        self._strings = tuple(strings)
        self._decode = decode
        self.num_tokens = max(len(text.encode()) for text in self._strings) + _MARGIN
        """How many of the last tokens can matter."""

    @classmethod
    def of(cls, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> StopStrings | None:
        """In what a tokenizer decodes; None if there are no strings."""
        if not strings:
            return None
        decode = partial(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return cls(strings, decode)

    def ending(self, before: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many of `tokens` belong to the completion, None if no string is completed in them.

        Args:
            before: the completion so far, or its last `num_tokens`.
            tokens: what would follow.
        """
        ids = [*before, *tokens]
        for end in range(len(before) + 1, len(ids) + 1):
            text = self._decode(ids[max(0, end - self.num_tokens) : end])
            if any(string in text for string in self._strings):
                return end - len(before)
        return None
