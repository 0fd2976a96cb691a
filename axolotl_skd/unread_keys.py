"""Keys that are set but that the chosen method does not read.

They are no errors, since a comparison changes the method of a config by one key and leaves the others;
but they are said, or a run would look as if it obeyed them.
"""

from __future__ import annotations

from axolotl_skd.config import Distillation
from axolotl_skd.methods import Share
from axolotl_skd.rollout.types import Source

_OF_SAMPLING = ("max_new_tokens", "rollout_batch_size", "stop_token_ids", "stop_strings")
_OF_INTERLEAVING = (
    *("num_draft_tokens", "acceptance", "teacher_top_k", "acceptance_top_p", "acceptance_min_p"),
    *("replacement", "bonus_token"),
)
_OF_STUDENT = ("student_temperature", "student_top_p")
_OF_TEACHER = ("teacher_temperature", "teacher_top_p")

_READ_FOR = {
    Source.DATASET: (),
    Source.STUDENT: (*_OF_SAMPLING, *_OF_STUDENT),
    Source.TEACHER: (*_OF_SAMPLING, *_OF_TEACHER),
    Source.INTERLEAVED: (*_OF_SAMPLING, *_OF_INTERLEAVING, *_OF_STUDENT, *_OF_TEACHER),
}


def unread_rollout_keys(distillation: Distillation) -> set[str]:
    """Keys of `distillation.rollout` that mean nothing to the method, set or not."""
    return set(_READ_FOR[Source.INTERLEAVED]) - set(_READ_FOR[distillation.method_row.source])


def unread_keys(distillation: Distillation) -> list[str]:
    """What is set, beside defaults, and not read, by its path under `distillation:`."""
    share = distillation.method_row.share
    paths = ["lmbda"] if share is not Share.LMBDA else []
    paths += ["switch_at"] if share is not Share.LATE else []
    paths += ["on_non_finite"] if not distillation.method_row.needs_teacher else []
    changed = [path for path in paths if _changed(distillation, path)]
    of_rollout = [
        f"rollout.{key}"
        for key in type(distillation.rollout).model_fields
        if key in unread_rollout_keys(distillation) and _changed(distillation.rollout, key)
    ]
    return changed + of_rollout


def _changed(block: object, key: str) -> bool:
    return getattr(block, key) != type(block).model_fields[key].default
