"""Which vocabularies can be compared, over how many tokens, and what is said of those that cannot."""

from __future__ import annotations

import pytest

from axolotl_skd.vocabulary import SharedVocabulary, VocabularyError, share_vocabulary


def vocab(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


ABC = vocab("a", "b", "c")


def test_equal_vocabularies_are_shared_whole() -> None:
    shared = share_vocabulary(ABC, dict(ABC), 3, 3)
    assert shared == SharedVocabulary(3, 3, 3, ())
    assert str(shared) == "3 tokens"


@pytest.mark.parametrize(("student", "teacher"), [(151_936, 152_064), (152_064, 151_936)])
def test_padded_widths_are_cut_to_the_smaller(student: int, teacher: int) -> None:
    shared = share_vocabulary(ABC, ABC, student, teacher)
    assert shared.size == 151_936
    assert (shared.student_size, shared.teacher_size) == (student, teacher)
    assert shared.student_only == ()
    assert str(shared) == (
        f"151936 tokens (student head {student}, teacher head {teacher}, both cut)"
    )


def test_the_order_of_the_mapping_does_not_matter() -> None:
    backwards = dict(reversed(ABC.items()))
    assert share_vocabulary(ABC, backwards, 3, 3).size == 3


def test_different_tokenizers_are_refused_naming_the_first_differing_tokens() -> None:
    student = vocab("a", "b", "c", "d", "e", "f")
    teacher = vocab("a", "B", "c", "D", "E", "F")
    with pytest.raises(VocabularyError) as refusal:
        share_vocabulary(student, teacher, 6, 6)
    message = str(refusal.value)
    assert "4 of 6 shared ids differ" in message
    assert "id 1: 'b' against 'B'; id 3: 'd' against 'D'; id 4: 'e' against 'E'." in message
    assert "'F'" not in message
    assert "distillation.teacher.base_model" in message


def test_one_differing_token_is_enough() -> None:
    with pytest.raises(VocabularyError, match="1 of 3 shared ids differ, first id 2: 'c' against"):
        share_vocabulary(ABC, vocab("a", "b", "z"), 3, 3)


def test_two_swapped_tokens_are_different_tokenizers() -> None:
    with pytest.raises(VocabularyError, match="2 of 3 shared ids differ"):
        share_vocabulary(ABC, vocab("a", "c", "b"), 3, 3)


def test_vocabularies_without_a_common_id_are_refused() -> None:
    with pytest.raises(VocabularyError, match="not a single id"):
        share_vocabulary({"a": 0}, {"a": 1}, 2, 2)


def test_a_student_token_beyond_the_teachers_head_is_refused() -> None:
    with pytest.raises(VocabularyError) as refusal:
        share_vocabulary(vocab("a", "b", "c", "<new>", "<newer>"), ABC, 64, 3)
    message = str(refusal.value)
    assert "2 token(s) that the teacher's head of 3 rows lacks" in message
    assert "first '<new>' (id 3)" in message
    assert "distillation.teacher.base_model" in message


def test_a_student_token_on_a_padding_row_of_the_teacher_is_reported() -> None:
    shared = share_vocabulary(vocab("a", "b", "c", "<new>"), ABC, 64, 64)
    assert shared.size == 64
    assert shared.student_only == ("<new>",)
    assert str(shared) == "64 tokens, 1 unknown to the teacher's tokenizer"


def test_the_last_row_of_the_teachers_head_is_still_there() -> None:
    assert share_vocabulary(vocab("a", "b", "c", "<new>"), ABC, 4, 4).student_only == ("<new>",)


def test_a_teacher_may_know_more_tokens() -> None:
    shared = share_vocabulary(ABC, vocab("a", "b", "c", "d", "e"), 3, 5)
    assert shared.size == 3
    assert shared.student_only == ()
