"""Configs of several GPUs: the paper's GSM8K distillation, on the engines that Axolotl runs on."""

from collections.abc import Callable
from dataclasses import dataclass

from example_configs.make_configs.paper import (
    batch_and_length,
    looks,
    paper_distillation,
    paper_name,
    prepare_data,
)
from example_configs.make_configs.paper_tables import FAMILIES, TASKS, Stage
from example_configs.make_configs.parts import (
    Entry,
    chat_rows,
    folders,
    header,
    models,
    unpacked,
    yaml_lines,
)

NUM_GPUS = (2, 8)
_TASK = TASKS["gsm8k"]
_BATCH = 8  # of all ranks: appendix C


@dataclass(frozen=True, slots=True)
class Launch:
    """A way to run several ranks.

    Attributes:
        family: of the models.
        quantised: is the teacher in 4 bit, whole on every rank?
        about: the header, behind what is distilled.
        keys: the entries that ask for it, by the number of GPUs.
    """

    family: str
    quantised: bool
    about: str
    keys: Callable[[int], str]


def _zero3(_gpus: int) -> str:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return (
        "deepspeed:  # or the path of a JSON file\n  zero_optimization:\n"
        + yaml_lines(
            [
                ("stage", 3),
                ("overlap_comm", "true"),
                ("contiguous_gradients", "true"),
                ("stage3_gather_16bit_weights_on_model_save", "true", "saves a model, not shards"),
            ],
            4,
        )
        + "  bf16:\n    enabled: auto\n"
        + yaml_lines([(key, "auto") for key in (*auto, "gradient_clipping")], 2)
    )


def _fsdp2(_gpus: int) -> str:
    return "fsdp_version: 2\nfsdp_config:\n" + yaml_lines(
        [
            ("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
            ("transformer_layer_cls_to_wrap", "GemmaDecoderLayer"),
            ("reshard_after_forward", "true"),
            ("state_dict_type", "FULL_STATE_DICT", "saves a model, not shards"),
            (
                "cpu_ram_efficient_loading",
                "false",
                "every rank tries out the whole student at start",
            ),
            ("offload_params", "false"),
        ],
        2,
    )


def _ray(gpus: int) -> str:
    keys = [("use_ray", "true"), ("ray_num_workers", gpus)]
    return yaml_lines(keys) + "resources_per_worker:\n" + yaml_lines([("GPU", 1)], 2)


_SPREAD = (
    "Student, gradients and optimizer states are spread over the ranks, and so is the teacher, "
    "unquantised. For a rollout every rank gathers both models whole, once a step; a teacher that "
    "fits no GPU is gathered by layers with teacher: {gather: layers}."
)
LAUNCHES = {
    "ddp": Launch(
        "qwen",
        True,
        "Plain data parallelism: every rank holds the student, and the teacher in 4 bit.",
        lambda _gpus: "",
    ),
    "zero3": Launch("gemma", False, f"DeepSpeed ZeRO-3 (pip install deepspeed). {_SPREAD}", _zero3),
    "fsdp2": Launch("gemma", False, f"FSDP2. {_SPREAD}", _fsdp2),
    "ray": Launch(
        "qwen",
        True,
        "Plain data parallelism through Ray (pip install 'ray[train]'); on a cluster all machines need "
        "this environment and the same paths.",
        _ray,
    ),
}


def ranks_name(name: str, gpus: int) -> str:
    """The file, without its ending."""
    return f"ranks/{name}_{gpus}gpus"


def ranks(name: str, gpus: int) -> str:
    """`ranks/<name>_<gpus>gpus.yml`"""
    launch = LAUNCHES[name]
    family = FAMILIES[launch.family]
    teacher = paper_name(_TASK, family, Stage.TEACHER_SFT)
    precision = "" if launch.quantised else ", but in bf16"
    about = (
        f"{family.teacher.title} -> {family.student.title} on GSM8K with {gpus} GPUs: as in "
        f"{paper_name(_TASK, family, Stage.SKD)}.yml, with the same batch of {_BATCH} rows{precision}. "
        f"{launch.about} Not yet run by us, for want of GPUs.\n\n"
        f"First the teacher:\n  axolotl train example_configs/{teacher}.yml\n\n"
        f"The data, from {_TASK.raw}:\n{prepare_data(_TASK, Stage.SKD)}"
    )
    batch: list[Entry] = [
        ("micro_batch_size", _BATCH // gpus, f"a rank's; {gpus} ranks make {_BATCH}"),
        *batch_and_length(_TASK, Stage.SKD)[1:],
        ("optimizer", "adamw_torch"),
        ("lr_scheduler", "linear"),
        ("warmup_ratio", 0.1),
        ("learning_rate", "1.0e-5"),
        ("gradient_checkpointing", "true"),
        ("attn_implementation", "sdpa"),
    ]
    asked = launch.keys(gpus)
    return "\n".join(
        [
            header(ranks_name(name, gpus), about) + models(family.student.hub_id),
            paper_distillation(_TASK, family, Stage.SKD, launch.quantised),
            *([asked] if asked else []),
            chat_rows("datasets", f"data/{_TASK.student_data}.jsonl")
            + chat_rows("test_datasets", f"data/{_TASK.validation}.jsonl")
            + yaml_lines([*family.chat, *folders(f"outputs/{ranks_name(name, gpus)}")]),
            yaml_lines(unpacked(_TASK.max_prompt_tokens + _TASK.max_new_tokens)),
            yaml_lines(batch) + "model_config:\n" + yaml_lines([("attention_dropout", 0.1)], 2),
            _PRECISION[launch.quantised],
            yaml_lines(looks(_TASK, Stage.SKD)),
        ]
    )


# Spread weights are kept in float32 by the engine; whole ones are loaded so, as in the paper's files.
_PRECISION = {
    True: yaml_lines([("bf16", "false"), ("fp16", "false"), ("tf32", "true")]),
    False: yaml_lines(
        [("bf16", "true", "the engine keeps float32 weights beside"), ("fp16", "false")]
    ),
}
