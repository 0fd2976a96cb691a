"""Configs of the SKD paper: fine-tuning of teacher and student, and distillation, for each task."""

from pathlib import Path

from axolotl_skd.methods import METHODS
from example_configs.make_configs.paper_tables import Family, Stage, Task
from example_configs.make_configs.parts import (
    Entry,
    chat_rows,
    folders,
    header,
    models,
    rollout_entries,
    unpacked,
    yaml_lines,
)

# Distillation of GSM8K has had these names from the first, outside paper/.
_NAMES = {("gsm8k", "gemma"): "skd_gemma2b", ("gsm8k", "qwen"): "skd_qwen0.5b"}


def paper_name(task: Task, family: Family, stage: Stage) -> str:
    """The file, without its ending."""
    name = f"paper/{task.name}_{family.name}_{stage.value}"
    return _NAMES.get((task.name, family.name), name) if stage is Stage.SKD else name


def paper_output(task: Task, family: Family, stage: Stage) -> str:
    """Where its model is saved; distillation finds its teacher there."""
    if stage is Stage.SKD:
        return f"outputs/{Path(paper_name(task, family, stage)).name}"
    model = family.teacher if stage is Stage.TEACHER_SFT else family.student
    return f"outputs/{model.slug}-{task.name}-sft"


def prepare_data(task: Task, stage: Stage) -> str:
    """The commands that make the two files which the stage reads."""
    if stage is Stage.TEACHER_SFT:
        data, sample = task.teacher_data, task.teacher_sample
    else:
        data, sample = task.student_data, task.student_sample
    lines = [
        *task.split,
        'to_chat() { axolotl skd to-chat "$@" \\',
        *(f"  {option} \\" for option in task.options[:-1]),
        f"  {task.options[-1]}; }}",
        f"to_chat {task.train} data/{data}.jsonl{sample}",
        f"to_chat {task.dev} data/{task.validation}.jsonl",
    ]
    return "\n".join(f"  {line}" for line in lines)


def about_paper(task: Task, family: Family, stage: Stage) -> str:
    """The header's text."""

    def train(stage: Stage) -> str:
        return f"  axolotl train example_configs/{paper_name(task, family, stage)}.yml"

    teacher, student = family.teacher, family.student
    own = paper_name(task, family, Stage.SKD)
    if stage is Stage.TEACHER_SFT:
        text = (
            f"fine-tuning of {teacher.title} on {task.teacher_rows:,} rows, the teacher of {own}.yml. "
            f"{_unrun(teacher.sft_memory)} With several GPUs: remove plugins: and distillation:, and "
            "let Axolotl's own fine-tuning shard the model (DeepSpeed, FSDP)."
        )
    elif stage is Stage.STUDENT_SFT:
        start = f", and another start for {own}.yml (section 5.3)" if task.task_specific else ""
        text = (
            f"fine-tuning of {student.title} on {task.rows:,} rows, the paper's SFT baseline{start}. "
            f"{_unrun(student.sft_memory)}"
        )
    else:
        text = (
            f"{teacher.title}, fine-tuned on the task and in 4 bit -> {student.title}, {task.rows:,} "
            f"rows.{family.remark} {_unrun(family.skd_memory)}\n\n"
            f"First the teacher:\n{train(Stage.TEACHER_SFT)}\n"
        )
        if task.task_specific:
            text += (
                "Another start of the student, fine-tuned on its rows (section 5.3):\n"
                f"{train(Stage.STUDENT_SFT)}\n"
                f"{train(stage)} \\\n    --base-model {paper_output(task, family, Stage.STUDENT_SFT)}\n"
                "The paper's baselines are this file with another method: supervised_kd, on_policy_kd, "
                "imitkd (section 5.1), two_stage (section 5.5); its SFT is the student's fine-tuning.\n"
            )
        else:
            text += (
                "The paper's baselines are this file with another method: supervised_kd, on_policy_kd "
                "(section 5.2, for Gemma); its SFT is the student's fine-tuning:\n"
                f"{train(Stage.STUDENT_SFT)}\n"
            )
        text += task.scale
    text = f"SKD paper, {task.title}: {text}"
    data = f"The data (section 4.1; format: appendix E), from {task.raw}. {task.remark}".strip()
    return f"{text}\n\n{data}\n{prepare_data(task, stage)}"


def _unrun(memory: str) -> str:
    return f"Not yet run by us: estimated to need {memory}, and access to the hub."


def paper_distillation(task: Task, family: Family, stage: Stage, quantised: bool = True) -> str:
    """The block, with the sources of its figures."""
    name = "skd" if stage is Stage.SKD else "sft"
    settings = {
        "max_prompt_tokens": (task.max_prompt_tokens, "lengths: appendix C"),
        "max_new_tokens": (task.max_new_tokens,),
        "num_draft_tokens": (
            "auto",
            "sets the speed, not the tokens; the paper drafts 5 (section 3.2)",
        ),
        "teacher_top_k": (25, "section 4"),
        "student_temperature": (0.5, "temperatures and top-p: appendix C"),
        "student_top_p": (0.5,),
        "teacher_temperature": (0.2,),
        "teacher_top_p": (task.teacher_top_p,),
    }
    in_4_bit: list[Entry] = [
        ("load_in_4bit", "true", "to fit a GPU; the paper does not speak of quantisation"),
        ("bnb_4bit_quant_type", "nf4"),
        ("bnb_4bit_use_double_quant", "true"),
    ]
    teacher = [
        ("base_model", f"./{paper_output(task, family, Stage.TEACHER_SFT)}"),
        *(in_4_bit if quantised else []),
        ("dtype", "bfloat16"),
    ]
    return (
        "distillation:\n"
        + yaml_lines([("method", name)], 2)
        + ("  teacher:\n" + yaml_lines(teacher, 4) if METHODS[name].needs_teacher else "")
        + "  rollout:\n"
        + yaml_lines(rollout_entries(METHODS[name], settings), 4)
        + "  # The paper's test, before and after training (needs axolotl-skd[eval] and the hub):\n"
        f"  # eval: {{tasks: [{task.evaluation}], batch_size: 32}}\n"
    )


def updates(task: Task, stage: Stage) -> int:
    """Optimizer steps, if no row is dropped."""
    return task.steps if stage is Stage.SKD else 3 * _epoch(task, stage)


def _epoch(task: Task, stage: Stage) -> int:
    rows = task.teacher_rows if stage is Stage.TEACHER_SFT else task.rows
    return -(-rows // 8)


def batch_and_length(task: Task, stage: Stage) -> list[Entry]:
    batch: list[Entry] = [
        ("micro_batch_size", 8, "appendix C, as the next"),
        ("gradient_accumulation_steps", 1),
    ]
    if stage is Stage.TEACHER_SFT:
        batch = [
            ("micro_batch_size", 2, "2 x 4 = 8, the batch of appendix C, with the same loss"),
            ("gradient_accumulation_steps", 4),
        ]
    if stage is not Stage.SKD:
        return [*batch, ("num_epochs", 3, "section 4")]
    # Axolotl's warm-up is a share of the smaller of the two, and dropped rows shorten epochs.
    epochs = 2 * -(-task.steps // _epoch(task, stage))
    return [
        *batch,
        ("max_steps", task.steps, "appendix C"),
        ("num_epochs", epochs, "more than enough: max_steps decides"),
    ]


def looks(task: Task, stage: Stage) -> list[Entry]:
    """When it is evaluated and saved."""
    every = updates(task, stage) // 5
    large = stage is Stage.TEACHER_SFT
    return [
        ("eval_steps", every, "five looks; the paper does not say how many"),
        ("save_steps", every),
        ("save_total_limit", 2),
        *([("save_only_model", "true", "without the optimizer's states")] if large else []),
        ("load_best_model_at_end", "true", "lowest validation loss: section 4, appendix C"),
        ("logging_steps", 5),
        ("seed", 42),
    ]


def paper_training(task: Task, stage: Stage) -> str:
    """Batch, steps, optimizer, precision, and when to look."""
    optimizer = "paged_adamw_32bit" if stage is Stage.TEACHER_SFT else "adamw_torch"
    schedule: list[Entry] = [
        ("optimizer", optimizer, "the paper names none"),
        ("lr_scheduler", "linear", "appendix I"),
        ("warmup_ratio", 0.1, "section 4, as the next"),
        ("learning_rate", "1.0e-5"),
    ]
    dropout = ("attention_dropout", 0.1, "section 4: dropout 0.1; these models have no other")
    precision: list[Entry] = [
        ("bf16", "false"),
        ("fp16", "false"),
        ("tf32", "true"),
        ("gradient_checkpointing", "true"),
        ("attn_implementation", "sdpa"),
    ]
    return "\n".join(
        [
            yaml_lines([*batch_and_length(task, stage), *schedule])
            + "model_config:\n"
            + yaml_lines([dropout], 2),
            "# Float32 weights: at this learning rate most updates are smaller than half a bf16 step "
            "and would\n# be rounded away. TF32 keeps the matrix products fast.\n"
            + yaml_lines(precision),
            yaml_lines(looks(task, stage)),
        ]
    )


def paper(task: Task, family: Family, stage: Stage) -> str:
    """`paper/<task>_<family>_<stage>.yml`"""
    model = family.teacher if stage is Stage.TEACHER_SFT else family.student
    data = task.teacher_data if stage is Stage.TEACHER_SFT else task.student_data
    return "\n".join(
        [
            header(paper_name(task, family, stage), about_paper(task, family, stage))
            + models(model.hub_id),
            paper_distillation(task, family, stage),
            chat_rows("datasets", f"data/{data}.jsonl")
            + chat_rows("test_datasets", f"data/{task.validation}.jsonl")
            + yaml_lines([*family.chat, *folders(paper_output(task, family, stage))]),
            yaml_lines(unpacked(task.max_prompt_tokens + task.max_new_tokens)),
            paper_training(task, stage),
        ]
    )
