"""The committed tiny pair: splits share no problem, sizes are as promised, any text can be encoded."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
from transformers import AutoTokenizer

from axolotl_skd.evaluation.extraction import extract_hash
from axolotl_skd.resources import resource_path

TINY = resource_path("example_configs") / "tiny"
TEST = resource_path("evals") / "skd_tiny_arithmetic" / "test.jsonl"
EQUATION = re.compile(r"\d+ [-+*] \d+ = \d+")


def problems(split: str) -> list[tuple[str, str]]:
    """(question, answer) of a split."""
    path = TEST if split == "test" else TINY / "data" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if split == "test":
        return [(row["question"], row["answer"]) for row in rows]
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def chain(answer: str) -> tuple[str, ...]:
    """The arithmetic of an answer, whatever the story and the words."""
    return tuple(EQUATION.findall(answer))


@pytest.mark.parametrize(("split", "count"), [("train", 3500), ("validation", 200), ("test", 500)])
def test_every_problem_is_a_chain_that_ends_in_its_answer(split: str, count: int) -> None:
    rows = problems(split)
    assert len(rows) == count
    for _question, answer in rows:
        equations = chain(answer)
        assert 2 <= len(equations) <= 3
        assert equations[-1].rsplit(" ", 1)[1] == extract_hash(answer)
        for equation in equations:
            left, right = equation.split(" = ")
            a, operator, b = left.split()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[
                operator
            ] == int(right)


def test_splits_share_no_arithmetic() -> None:
    chains = {
        split: {chain(answer) for _, answer in problems(split)}
        for split in ("train", "validation", "test")
    }
    for a, b in combinations(chains, 2):
        assert not chains[a] & chains[b], (a, b)


def test_weights_and_vocabulary_are_small() -> None:
    weights = sum(path.stat().st_size for path in TINY.glob("*/model.safetensors"))
    assert weights <= 6_000_000
    assert (TINY / "teacher" / "tokenizer.json").read_bytes() == (
        TINY / "student" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(
    "text", ["Größe 12 345 €", "日本語\n\t <<48/2=24>>", "\x00\x7f é 🙂", "  a  b "]
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    assert 512 <= len(tokenizer) <= 1024
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_are_tokens_of_their_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    for token in tokenizer.get_vocab():
        assert not re.search(r"\d", token) or token in "0123456789"
