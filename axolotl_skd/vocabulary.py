"""Do student and teacher speak the same tokens, and over which part of their heads?

Checkpoints pad their vocabularies to different widths (Qwen2: 151,936 and 152,064): both heads are
cut to the smaller width before softmax, top-K and sampling. Different tokenizers are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class VocabularyError(ValueError):
    """The two models cannot be compared token by token."""


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """The vocabulary that losses and samplers see: ids below `size` of both heads."""

    size: int
    student_size: int
    teacher_size: int
    student_only: tuple[str, ...]

    def __str__(self) -> str:
        if self.student_size == self.teacher_size:
            text = f"{self.size} tokens"
        else:
            text = (
                f"{self.size} tokens (student head {self.student_size}, teacher head "
                f"{self.teacher_size}, both cut)"
            )
        if self.student_only:
            text += f", {len(self.student_only)} unknown to the teacher's tokenizer"
        return text


def share_vocabulary(
    student_vocab: Mapping[str, int],
    teacher_vocab: Mapping[str, int],
    student_size: int,
    teacher_size: int,
) -> SharedVocabulary:
    """Check that every id means the same token to both.

    Args:
        student_vocab: token -> id of the student's tokenizer, added tokens included.
        teacher_vocab: the same of the teacher's.
        student_size: rows of the student's output head, padding included.
        teacher_size: rows of the teacher's.

    Raises:
        VocabularyError: an id stands for different tokens, or the student has a token that the
            teacher's head has no row for.
    """
    student = {token_id: token for token, token_id in student_vocab.items()}
    teacher = {token_id: token for token, token_id in teacher_vocab.items()}
    shared = sorted(student.keys() & teacher.keys())
    if not shared:
        raise VocabularyError(
            "the tokenizers of student and teacher share not a single id: is one of them empty?"
        )
    differing = [i for i in shared if student[i] != teacher[i]]
    if differing:
        raise VocabularyError(
            "student and teacher use different tokenizers, so their distributions are over different "
            f"things: {len(differing)} of {len(shared)} shared ids differ, first "
            f"{_examples(differing, student, teacher)}. Choose a distillation.teacher.base_model of "
            "the student's family, with the same tokenizer."
        )
    beyond = sorted(i for i in student if i >= teacher_size)
    if beyond:
        raise VocabularyError(
            f"the student's tokenizer has {len(beyond)} token(s) that the teacher's head of "
            f"{teacher_size} rows lacks, first {student[beyond[0]]!r} (id {beyond[0]}). Do not add "
            "tokens (special_tokens, tokens) that the teacher does not know, or choose another "
            "distillation.teacher.base_model."
        )
    return SharedVocabulary(
        size=min(student_size, teacher_size),
        student_size=student_size,
        teacher_size=teacher_size,
        student_only=tuple(student[i] for i in sorted(student.keys() - teacher.keys())),
    )


def _examples(
    ids: Sequence[int], student: Mapping[int, str], teacher: Mapping[int, str], count: int = 3
) -> str:
    return "; ".join(f"id {i}: {student[i]!r} against {teacher[i]!r}" for i in ids[:count])
