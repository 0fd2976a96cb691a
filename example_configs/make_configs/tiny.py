"""Configs of the embedded tiny pair: one per method, and one on real text."""

from dataclasses import dataclass
from types import MappingProxyType

from axolotl_skd.methods import METHODS
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

TINY_SAMPLING = MappingProxyType(
    {
        "num_draft_tokens": (5, "fixed, so that a run on a CPU repeats bit by bit"),
        "teacher_top_k": (3, "of 512 tokens; the paper's 25 is of 150,000 to 256,000"),
        "student_temperature": (0.5,),
        "student_top_p": (0.5,),
        "teacher_temperature": (0.2,),
        "teacher_top_p": (1.0,),
    }
)


@dataclass(frozen=True, slots=True)
class TinyMethod:
    """What is said about a method, and the keys that are its own.

    Attributes:
        about: the header.
        keys: entries of `distillation:` behind `method:`.
        blocks: YAML of `distillation:` behind the rollout, two spaces deep.
    """

    about: str
    keys: tuple[Entry, ...] = ()
    blocks: str = ""


TINY = {
    "skd": TinyMethod(
        "Speculative Knowledge Distillation from start to end on two CPU cores: the tiny pair of "
        "tiny/ (made by tiny/make_pair.py) on generated arithmetic word problems, with the accuracy "
        "before and after."
    ),
    "on_policy_kd": TinyMethod(
        "On-policy distillation of the tiny pair: the student learns the teacher's distributions on "
        "completions that it samples itself."
    ),
    "supervised_kd": TinyMethod(
        "Supervised distillation of the tiny pair: the student learns the teacher's distributions on "
        "the data set's completions."
    ),
    "speckd": TinyMethod(
        "SpecKD of the tiny pair: as supervised_kd, on the tokens that pass a gate alone. The rule "
        "and its k are our choice, the method's abstract does not give them.",
        blocks="  gate:\n"
        + yaml_lines(
            [
                ("rule", "top_k", "is the student's most likely token among the teacher's top_k?"),
                ("top_k", 5),
                ("reject_weight", 0.0, "SpecKD masks what does not pass; SelecTKD: 0.01"),
            ],
            4,
        ),
    ),
    "imitkd": TinyMethod(
        "ImitKD of the tiny pair: a fair coin per sequence, the student's own completion or the data "
        "set's."
    ),
    "gkd": TinyMethod(
        "Generalised distillation (GKD) of the tiny pair: the student's own completion with "
        "probability lmbda, else the data set's, and the Jensen-Shannon divergence.",
        keys=(("lmbda", 0.5),),
        blocks="  loss:\n" + yaml_lines([("divergence", "jsd"), ("jsd_beta", 0.5)], 4),
    ),
    "mixed_skd": TinyMethod(
        "SKD and ground truth mixed, on the tiny pair: an interleaved completion with probability "
        "lmbda, else the data set's.",
        keys=(("lmbda", 0.5),),
    ),
    "two_stage": TinyMethod(
        "Two stages on the tiny pair: supervised distillation up to switch_at of the steps, then "
        "on-policy (SKD paper, section 5.5 and appendix I).",
        keys=(("switch_at", 0.5),),
    ),
    "seqkd": TinyMethod(
        "Sequence-level distillation of the tiny pair: the teacher writes completions once, before "
        "training, and the student is fine-tuned on them. They are kept beside the prepared data.",
        blocks="  seqkd:\n" + yaml_lines([("decoding", "sampled", "or greedy")], 4),
    ),
    "sft": TinyMethod(
        "Fine-tuning of the tiny student on the data set's completions, without a teacher: the same "
        "data checks, loss and logs as the other methods, to compare with."
    ),
}


def tiny_method(name: str) -> TinyMethod:
    """Its record; of a method without one, what the table of methods says."""
    return TINY.get(name) or TinyMethod(f"{name} of the tiny pair: {METHODS[name].summary}.")


def tiny_distillation(name: str, prompt: int, new: int) -> str:
    """The block up to its end, without `eval`."""
    method, record = METHODS[name], tiny_method(name)
    settings = {"max_prompt_tokens": (prompt,), "max_new_tokens": (new,), **TINY_SAMPLING}
    teacher = "  teacher:\n    base_model: example_configs/tiny/teacher\n"
    return (
        "distillation:\n"
        + yaml_lines([("method", name), *record.keys], 2)
        + (teacher if method.needs_teacher else "")
        + "  rollout:\n"
        + yaml_lines(rollout_entries(method, settings), 4)
        + record.blocks
    )


def tiny_training(rows: int, steps: int, epochs: int) -> list[Entry]:
    return [
        ("micro_batch_size", rows),
        ("gradient_accumulation_steps", 1),
        ("max_steps", steps),
        ("num_epochs", epochs),
        ("optimizer", "adamw_torch"),
        ("lr_scheduler", "linear"),
        ("warmup_ratio", 0.1),
        ("learning_rate", "1.0e-3"),
        ("weight_decay", 0.0),
    ]


CPU: list[Entry] = [
    ("bf16", "false"),
    ("fp16", "false"),
    ("tf32", "false"),
    ("dataloader_pin_memory", "false"),
]


def tiny(name: str) -> str:
    """`<method>_tiny.yml`"""
    file = f"{name}_tiny"
    logs = [("eval_strategy", "steps"), ("eval_steps", 100), ("save_steps", 100)]
    logs += [("save_total_limit", 1), ("logging_steps", 10), ("seed", 42)]
    return "\n".join(
        [
            header(file, tiny_method(name).about) + models("example_configs/tiny/student"),
            tiny_distillation(name, 96, 80)
            + "  eval:\n"
            + yaml_lines([("tasks", "[skd_tiny_arithmetic]"), ("batch_size", 100)], 4),
            chat_rows("datasets", "example_configs/tiny/data/train.jsonl")
            + chat_rows("test_datasets", "example_configs/tiny/data/validation.jsonl")
            + yaml_lines([("chat_template", "tokenizer_default"), *folders(f"outputs/{file}")]),
            yaml_lines(unpacked(256)),
            yaml_lines(tiny_training(32, 300, 3)),
            yaml_lines(logs),
            yaml_lines(CPU),
        ]
    )


def tiny_gsm8k() -> str:
    """`skd_tiny_gsm8k.yml`"""
    file = "skd_tiny_gsm8k"
    about = (
        "The tiny pair on real text: a few steps on GSM8K's training questions. The pair knows "
        "nothing of them (its tokenizer and training saw generated problems only); this shows the "
        "path for data of your own.\n\n"
        "The data, from the release's train.jsonl:\n"
        "  axolotl skd to-chat train.jsonl data/gsm8k_questions.jsonl --user '{question}' "
        "--assistant '{answer}' \\\n    --remove '<<.*?>>'"
    )
    logs = [("eval_steps", 10), ("save_steps", 20), ("save_total_limit", 1)]
    logs += [("logging_steps", 2), ("seed", 42)]
    return "\n".join(
        [
            header(file, about) + models("example_configs/tiny/student"),
            tiny_distillation("skd", 384, 128),
            chat_rows("datasets", "data/gsm8k_questions.jsonl")
            + yaml_lines(
                [
                    ("val_set_size", 64),
                    ("chat_template", "tokenizer_default"),
                    *folders(f"outputs/{file}"),
                ]
            ),
            yaml_lines(unpacked(1536)),
            yaml_lines(tiny_training(8, 20, 1)),
            yaml_lines(logs),
            yaml_lines(CPU),
        ]
    )
