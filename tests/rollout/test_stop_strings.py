"""Stop strings: a row ends at the token that completes one, whatever the draft length.

The oracle decodes the whole completion after every token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl_skd.rollout.engine import RolloutEngine
from axolotl_skd.rollout.lm import CausalLM
from axolotl_skd.rollout.stop_strings import StopStrings
from axolotl_skd.rollout.types import AUTO, FinishReason, Rollout
from tests.rollout import oracle
from tests.rollout.oracle import Key, OracleRow
from tests.rollout.scripted import (
    ScriptedLM,
    batch,
    completions,
    count_up,
    params_of,
    skip_before_multiples_of_four,
    skip_one,
)
from tests.rollout.test_acceptance import (
    EPOCH,
    FIRST_SAMPLE,
    MAX_NEW,
    PROMPTS,
    SEED,
    STUDENT,
    TEACHER,
    models_of,
    prompts_of,
    rows_of,
)
from tests.rollout.test_acceptance import (
    params_of as sampling_of,
)
from tests.rollout.tiny import STOP_IDS, one_thread

TINY = Path(__file__).parents[2] / "example_configs" / "tiny" / "student"
STOP, LENGTH = int(FinishReason.STOP), int(FinishReason.LENGTH)


def numbers(ids: list[int]) -> str:
    """3, 14 -> "3 14 "."""
    return "".join(f"{token} " for token in ids)


def letters(ids: list[int]) -> str:
    return "".join(chr(ord("a") + token % 26) for token in ids)


def utf8(ids: list[int]) -> str:
    """A token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def naive_ending(
    strings: list[str], decode: Callable[[list[int]], str], ids: list[int]
) -> int | None:
    for end in range(1, len(ids) + 1):
        if any(string in decode(ids[:end]) for string in strings):
            return end
    return None


# --- the search -------------------------------------------------------------------------------


def search(stops: StopStrings, ids: list[int], chunk: int) -> int | None:
    """Round by round, with only as much of the past as is asked for."""
    for start in range(0, len(ids), chunk):
        end = stops.ending(
            ids[max(0, start - stops.num_tokens) : start], ids[start : start + chunk]
        )
        if end is not None:
            return start + end
    return None


@cache
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def tiny_text(ids: list[int]) -> str:
    return tiny_tokenizer().decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


ALPHABETS = {
    # decode -> (tokens to choose from, strings)
    letters: (range(4), ["abca", "dd", "bbbbb"]),
    utf8: ("aé!€ ".encode(), ["é!", "€€", "a €", "!!!"]),
    numbers: (range(12), ["3 1", "11 11", " 7 7 "]),
    tiny_text: (range(262, 330), ["st", "ow i", "manym", "ee"]),
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("decode", ALPHABETS, ids=lambda decode: decode.__name__)
def test_every_chunking_finds_what_the_whole_text_says(
    decode: Callable[[list[int]], str], chunk: int
) -> None:
    rng = random.Random(0)
    tokens, strings = ALPHABETS[decode]
    stops, found = StopStrings(strings, decode), 0
    for _ in range(60):
        ids = rng.choices(list(tokens), k=rng.randint(1, 60))
        expected = naive_ending(strings, decode, ids)
        assert search(stops, ids, chunk) == expected
        found += expected is not None
    assert found > 5


def test_half_a_character_completes_nothing() -> None:
    stops = StopStrings(["é"], utf8)
    assert stops.ending([], list("é".encode())[:1]) is None
    assert stops.ending(list("é".encode())[:1], list("é".encode())[1:] + [33]) == 1


# --- the engine, by hand ----------------------------------------------------------------------


def rollout(
    strings: list[str],
    num_draft_tokens: int,
    teacher=count_up,
    stop_ids: tuple[int, ...] = (),
    max_new: tuple[int, int] = (9, 9),
    **options: int,
) -> Rollout:
    engine = RolloutEngine(
        ScriptedLM(count_up),
        ScriptedLM(teacher),
        stop_strings=StopStrings(strings, numbers),
        **options,
    )
    prompts = batch([[2], [5, 20]], list(max_new))
    return engine.interleave(prompts, params_of(num_draft_tokens, stop_ids=stop_ids))


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4, 5, 9])
def test_a_row_ends_at_the_completing_token(num_draft_tokens: int) -> None:
    """ "5 6" is complete with 6; "2 3" would need the prompt's 2; "2 23" is the end of "22 23"."""
    result = rollout(["5 6", "2 3", "2 23"], num_draft_tokens)
    assert completions(result) == [[3, 4, 5, 6], [21, 22, 23]]
    assert result.finish_reasons.tolist() == [STOP, STOP]
    assert torch.equal(result.accepted_mask, result.completion_mask)
    assert (result.completion_ids[~result.completion_mask] == 0).all()
    assert (result.proposed_ids[~result.completion_mask] == -1).all()
    assert (result.teacher_hidden[~result.completion_mask] == 0).all()


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
def test_a_replacement_may_complete_a_string(num_draft_tokens: int) -> None:
    result = rollout(["6 8", "9"], num_draft_tokens, teacher=skip_one)
    assert completions(result) == [[4, 6, 8], [22, 24, 26, 28, 30, 32, 34, 36, 38]]
    assert result.finish_reasons.tolist() == [STOP, LENGTH]


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 6])
def test_whichever_comes_first(num_draft_tokens: int) -> None:
    """Stop token 4 before "5", "22" before stop token 23; at the limit it still counts as stop."""
    result = rollout(["5", "22"], num_draft_tokens, stop_ids=(4, 23))
    assert completions(result) == [[3, 4], [21, 22]]
    assert result.finish_reasons.tolist() == [STOP, STOP]
    at_the_limit = rollout(["5", "24"], num_draft_tokens, max_new=(3, 3))
    assert completions(at_the_limit) == [[3, 4, 5], [21, 22, 23]]
    assert at_the_limit.finish_reasons.tolist() == [STOP, LENGTH]


def test_counts_of_the_cut_rows() -> None:
    """Row 0: [3 5!] [6 7] cut; K = 1 refuses 4. What was proposed behind the end was paid for."""
    result = rollout(["6"], 3, teacher=skip_before_multiples_of_four)
    assert completions(result)[0] == [3, 5, 6]
    assert result.accepted_mask[0].tolist()[:3] == [True, False, True]
    assert result.num_proposed[0] == 6


def test_a_row_in_a_used_seat_starts_with_no_text() -> None:
    """One seat: row 0 ends with 5, row 1 begins with 21, and "5 21" is never found."""
    result = rollout(["5", "5 21"], 3, rollout_batch_size=1)
    assert completions(result) == [[3, 4, 5], [21, 22, 23, 24, 25]]


@pytest.mark.parametrize("method", ["sample_student", "sample_teacher"])
def test_one_model_alone_stops_too(method: str) -> None:
    engine = RolloutEngine(
        ScriptedLM(count_up), ScriptedLM(count_up), stop_strings=StopStrings(["5 6"], numbers)
    )
    result = getattr(engine, method)(batch([[2], [20]], [9, 3]), params_of(5))
    assert completions(result) == [[3, 4, 5, 6], [21, 22, 23]]
    assert result.finish_reasons.tolist() == [STOP, LENGTH]


# --- the engine, by the oracle ----------------------------------------------------------------

STRINGS = ["q", "ee", "jz", "tg", "s"]


@cache
def expected_rows(family: str) -> list[OracleRow]:
    student, teacher = (oracle.uncached(model) for model in models_of(family))
    return [
        oracle.interleave(
            student,
            teacher,
            prompt,
            Key(SEED, EPOCH, FIRST_SAMPLE + i),
            MAX_NEW[i],
            STUDENT,
            TEACHER,
            top_k=40,
            stop_ids=STOP_IDS,
            ends=lambda ids: any(string in letters(ids) for string in STRINGS),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5, AUTO])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_the_engine_equals_the_oracle(
    family: str, num_draft_tokens: int | str, batch_size: int
) -> None:
    expected = expected_rows(family)
    by_text = [
        row for row in expected if row.finish == "STOP" and row.completion[-1] not in STOP_IDS
    ]
    assert len(by_text) > 2
    with one_thread():
        for start in range(0, len(PROMPTS), batch_size):
            engine = RolloutEngine(
                *map(CausalLM, models_of(family)), stop_strings=StopStrings(STRINGS, letters)
            )
            got = engine.interleave(
                prompts_of(start, start + batch_size), sampling_of("top_k", num_draft_tokens)
            )
            assert rows_of(got) == expected[start : start + batch_size]
