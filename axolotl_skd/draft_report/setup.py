"""What a report is made on: prompts, models and settings from a training config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from axolotl.cli.config import load_cfg
from axolotl.cli.utils.load import resolve_chat_template_str
from axolotl.common.datasets import load_datasets
from axolotl.loaders import load_tokenizer
from transformers import PreTrainedModel

from axolotl_skd.config import Distillation, read_distillation
from axolotl_skd.data import completion_span
from axolotl_skd.data_checks import checked_datasets
from axolotl_skd.devices import present_devices
from axolotl_skd.draft_report.decoding import Decoding, forget_generation_settings, make_draft
from axolotl_skd.draft_report.errors import DraftReportError
from axolotl_skd.draft_report.models import load_student, student_files
from axolotl_skd.draft_report.options import ReportOptions
from axolotl_skd.draft_report.prompts import (
    Conversation,
    read_prompt_file,
    read_task,
    render,
)
from axolotl_skd.draft_report.widths import cut_to_one_width, head_width
from axolotl_skd.draft_report.windows import draft_window
from axolotl_skd.preflight import Preflight, check_models, check_settings, usable_positions
from axolotl_skd.teacher import load_teacher
from axolotl_skd.vocabulary import share_vocabulary

_PAPERS_DRAFT_LENGTH = 5  # where the config leaves it to `auto`, which is about training


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that is measured, ready to decode.

    Attributes:
        teacher: as in training.
        students: "before" and, if training has saved one, "after".
        prompts: token ids of each.
        untempered: sampling from the models' own distributions, with the stop set of training.
        seed: of the samples.
        settings: what the reader of the report should know, by name.
        notes: the same, in sentences.
    """

    teacher: PreTrainedModel
    students: dict[str, PreTrainedModel]
    prompts: list[list[int]]
    untempered: Decoding
    seed: int
    settings: dict[str, Any]
    notes: list[str]


def prepare(config: Path, options: ReportOptions) -> Setup:
    """Read a config, find the prompts, load the models and bring them to one vocabulary width.

    Raises:
        DraftReportError, preflight.ConfigConflictError, data_checks.DataError, teacher.TeacherError,
        vocabulary.VocabularyError
    """
    conversations, source = _conversations(options)
    cfg = load_cfg(str(config))
    distillation = _distillation(cfg)
    check_settings(cfg, distillation)
    tokenizer = load_tokenizer(cfg)
    preflight = check_models(cfg, distillation, tokenizer)
    if conversations is None:
        prompts = _data_prompts(cfg, distillation, preflight, options.limit)
    else:
        prompts = render(conversations, tokenizer, resolve_chat_template_str(cfg, tokenizer))
    prompts, notes = _short_enough(prompts, distillation.rollout.max_prompt_tokens)
    max_new_tokens = options.max_new_tokens or distillation.rollout.max_new_tokens
    num_draft_tokens = options.num_draft_tokens or _draft_length(distillation)
    seed = _seed(cfg, distillation, options)

    teacher, students = _load(cfg, distillation, preflight, num_tokens=len(tokenizer))
    longest = max(map(len, prompts))
    _check_positions([teacher, *students.values()], longest, max_new_tokens)
    _check_windows(list(students.values()), longest, max_new_tokens)
    width = cut_to_one_width([teacher, *students.values()])
    forget_generation_settings(teacher)
    for student in students.values():
        make_draft(student, num_draft_tokens)
    if "after" not in students:
        notes.append(f"output_dir {cfg.output_dir} holds no trained student: before training only")
    return Setup(
        teacher=teacher,
        students=students,
        prompts=prompts,
        untempered=Decoding(
            temperature=1.0,
            max_new_tokens=max_new_tokens,
            stop_token_ids=preflight.stop_token_ids,
            pad_token_id=tokenizer.pad_token_id,
        ),
        seed=seed,
        settings={
            "teacher": distillation.teacher.base_model,
            "prompts": f"{len(prompts)} of {source}",
            "draft tokens": f"{num_draft_tokens} (constant)",
            "max new tokens": max_new_tokens,
            "vocabulary": width,
            "passes": options.repeats,
            "device": str(teacher.device),
            "seed": seed,
        },
        notes=notes,
    )


def _conversations(options: ReportOptions) -> tuple[list[Conversation] | None, str]:
    """What the command line gives for prompts, None if nothing, and how to call it."""
    if options.prompts is not None and options.task is not None:
        raise DraftReportError("--prompts and --task are both given: give one of them.")
    if options.prompts is not None:
        return read_prompt_file(options.prompts, options.limit), str(options.prompts)
    if options.task is not None:
        return read_task(options.task, options.limit), options.task
    return None, "the config's own data"


def _distillation(cfg: Any) -> Distillation:
    distillation = read_distillation(cfg)
    if distillation is None:
        raise DraftReportError(
            "the config has no distillation: block, so there is no teacher to draft for. Add "
            "plugins: [axolotl_skd.SKDPlugin] and distillation: with a method and a teacher."
        )
    if not distillation.method_row.needs_teacher:
        raise DraftReportError(
            f"distillation.method: {distillation.method} has no teacher to draft for. Name a method "
            "that has one, and distillation.teacher.base_model, in the config (a copy of it will do)."
        )
    if distillation.teacher.student_base:
        raise DraftReportError(
            "distillation.teacher.student_base: the teacher is the student's own base, and a draft as "
            "large as its teacher saves nothing. Name a teacher by base_model in a copy of the config."
        )
    return distillation


def _data_prompts(
    cfg: Any, distillation: Distillation, preflight: Preflight, limit: int
) -> list[list[int]]:
    """The prompts of the validation rows, or without such of the training rows, as in training."""
    stops = preflight.stop_token_ids
    datasets = checked_datasets(cfg, load_datasets(cfg=cfg), distillation, stops)
    rows = datasets.eval_dataset or datasets.train_dataset
    rows = rows.select(range(min(limit, len(rows))))
    return [
        row["input_ids"][: completion_span(row["labels"], row["input_ids"], stops).start]
        for row in rows
    ]


def _short_enough(prompts: Sequence[list[int]], longest: int) -> tuple[list[list[int]], list[str]]:
    """The prompts that training would keep, and a note on the others."""
    kept = [prompt for prompt in prompts if len(prompt) <= longest]
    dropped = len(prompts) - len(kept)
    if not kept:
        raise DraftReportError(
            f"all {len(prompts)} prompts are longer than distillation.rollout.max_prompt_tokens "
            f"({longest}), the shortest has {min(map(len, prompts))} tokens. Raise it in the config."
        )
    note = (
        f"{dropped} of {len(prompts)} prompts left out: longer than "
        f"distillation.rollout.max_prompt_tokens ({longest})"
    )
    return kept, [note] if dropped else []


def _load(
    cfg: Any, distillation: Distillation, preflight: Preflight, num_tokens: int
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """The teacher as in training and the students, all of one vocabulary."""
    device = torch.device(cfg.device)
    _check_device(distillation.teacher.device)
    students = {
        name: load_student(files, num_tokens=num_tokens, dtype=cfg.torch_dtype, device=device)
        for name, files in student_files(cfg).items()
    }
    teacher = load_teacher(distillation.teacher, device)
    for student in students.values():
        share_vocabulary(
            preflight.student_vocab,
            preflight.teacher_vocab,
            head_width(student),
            head_width(teacher),
        )
    return teacher, students


def _check_device(name: str | None) -> None:
    """Is the device there that the config puts the teacher on?"""
    present = present_devices()
    if name is not None and name not in present:
        raise DraftReportError(
            f"distillation.teacher.device: {name}, but this machine has {', '.join(present)}. Run the "
            "report where the teacher fits, or change the key in a copy of the config."
        )


def _check_positions(
    models: Sequence[PreTrainedModel], prompt_tokens: int, max_new_tokens: int
) -> None:
    for model in models:
        positions, why = usable_positions(model.config.get_text_config())
        if positions is not None and prompt_tokens + max_new_tokens > positions:
            raise DraftReportError(
                f"the longest prompt has {prompt_tokens} tokens and --max-new-tokens is "
                f"{max_new_tokens}, but {model.config.name_or_path} has {positions} positions{why}. "
                "Lower --max-new-tokens."
            )


def _check_windows(
    students: Sequence[PreTrainedModel], prompt_tokens: int, max_new_tokens: int
) -> None:
    for student in students:
        window = draft_window(student)
        if window is not None and prompt_tokens + max_new_tokens > window:
            raise DraftReportError(
                f"the longest prompt has {prompt_tokens} tokens and --max-new-tokens is "
                f"{max_new_tokens}, but {student.config.name_or_path} has a sliding window of "
                f"{window} tokens, beyond which transformers {transformers.__version__} drafts wrongly "
                "(huggingface/transformers#48280). Lower --max-new-tokens, or install a transformers "
                "that holds that fix."
            )


def _draft_length(distillation: Distillation) -> int:
    length = distillation.rollout.num_draft_tokens
    return _PAPERS_DRAFT_LENGTH if length == "auto" else length


def _seed(cfg: Any, distillation: Distillation, options: ReportOptions) -> int:
    """The first that is set: option, `distillation.seed`, Axolotl's."""
    seeds = (options.seed, distillation.seed, cfg.seed)
    return next((seed for seed in seeds if seed is not None), 0)
