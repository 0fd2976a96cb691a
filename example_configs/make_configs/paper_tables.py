"""What the SKD paper says of its tasks and models, with where it says so, and what it leaves open.

Xu et al., ICLR 2025, https://arxiv.org/abs/2410.11325. What holds for all of its tasks (K, rates,
batch, temperatures) stands in paper.py, where it is written out.
"""

from dataclasses import dataclass
from enum import Enum

from example_configs.make_configs.parts import Entry


class Stage(str, Enum):
    """What is trained."""

    TEACHER_SFT = "teacher_sft"
    STUDENT_SFT = "student_sft"
    SKD = "skd"


@dataclass(frozen=True, slots=True)
class Model:
    """A model of a family.

    Attributes:
        hub_id: the instruction-tuned model that training starts from (section 4).
        title: for people.
        slug: in the names of outputs.
        sft_memory: what full fine-tuning with float32 weights needs, from the forecast of memory.py.
    """

    hub_id: str
    title: str
    slug: str
    sft_memory: str


@dataclass(frozen=True, slots=True)
class Family:
    """Teacher and student that share a tokenizer.

    Attributes:
        name: in file names.
        teacher, student: the pair.
        chat: how its chats are written.
        skd_memory: what distillation from the 4-bit teacher needs, likewise.
        remark: for the header of the distillation.
    """

    name: str
    teacher: Model
    student: Model
    chat: tuple[Entry, ...]
    skd_memory: str
    remark: str = ""


def _paged(gpu: int, host: int) -> str:
    """In GB: weights and gradients, and Adam's moments, are 8 bytes a parameter each."""
    return f"a GPU of {gpu} GB, {host} GB of the host's memory (the optimizer's states are paged)"


FAMILIES = {
    "gemma": Family(
        name="gemma",
        teacher=Model("google/gemma-7b-it", "Gemma-7B-it", "gemma7b", _paged(96, 70)),
        student=Model("google/gemma-2b-it", "Gemma-2B-it", "gemma2b", "a GPU of 80 GB"),
        chat=(
            ("chat_template", "gemma"),
            ("eot_tokens", '["<end_of_turn>"]', "Gemma ends its turns with it, not with <eos>"),
        ),
        skd_memory="a GPU of 80 GB",
    ),
    "qwen": Family(
        name="qwen",
        teacher=Model("Qwen/Qwen2-7B-Instruct", "Qwen2-7B-it", "qwen2-7b", _paged(80, 62)),
        student=Model("Qwen/Qwen2-0.5B-Instruct", "Qwen2-0.5B-it", "qwen2-0.5b", "a GPU of 24 GB"),
        chat=(("chat_template", "tokenizer_default"),),
        skd_memory="a GPU of 40 GB",
        remark=" Their heads are padded to different widths (152,064 and 151,936): both are cut to "
        "the smaller one.",
    ),
}


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the paper: section 4.1, appendices C and E.

    Attributes:
        name: in file names.
        title: for people.
        max_prompt_tokens, max_new_tokens: P and T (appendix C).
        steps: of distillation (appendix C).
        rows, teacher_rows: what the student, and the teacher, is trained on (section 4.1).
        teacher_top_p: of the teacher's replacements (appendix C).
        raw: what the data is made from.
        split: shell lines that make `train` and `dev` of it.
        train, dev: files of JSON lines.
        options: of `axolotl skd to-chat`, the format of appendix E.
        teacher_data, student_data, validation: chat rows in data/.
        teacher_sample, student_sample: options that take their rows from `train`.
        evaluation: the paper's test, as a bundled task.
        scale: the other sizes of the paper.
        task_specific: are the tests of the same task (section 5.1), or others (section 5.2)?
        remark: what the paper leaves open, or what is not as in the paper.
    """

    name: str
    title: str
    max_prompt_tokens: int
    max_new_tokens: int
    steps: int
    rows: int
    teacher_rows: int
    raw: str
    split: tuple[str, ...]
    train: str
    dev: str
    options: tuple[str, ...]
    teacher_data: str
    student_data: str
    validation: str
    student_sample: str
    evaluation: str
    scale: str
    teacher_sample: str = ""
    teacher_top_p: float = 1.0
    task_specific: bool = True
    remark: str = ""


LOW_DATA = (
    "With 100 rows (section 5.4, appendix C): --sample 100 below, max_steps: 125, num_epochs: 20, "
    "eval_steps and save_steps: 25."
)

TASKS = {
    "translation": Task(
        name="translation",
        title="Assamese to English (Flores-200)",
        max_prompt_tokens=256,
        max_new_tokens=256,
        steps=1225,
        rows=997,
        teacher_rows=997,
        raw="the text files of Flores-200",
        split=(
            'pairs=\'import json, sys; [print(json.dumps(dict(zip(("source", "target"),',
            '  line.strip("\\n").split("\\t"))))) for line in sys.stdin]\'',
            'paste dev/{asm_Beng,eng_Latn}.dev | python -c "$pairs" > flores_dev.jsonl',
            "paste devtest/{asm_Beng,eng_Latn}.devtest | head -n 500 | "
            'python -c "$pairs" > flores_validation.jsonl',
        ),
        train="flores_dev.jsonl",
        dev="flores_validation.jsonl",
        options=(
            "--user 'Translate Assamese sentence into English. This is the Assamese sentence: "
            "{source}. Here is the English translation:'",
            "--assistant '{target}'",
        ),
        teacher_data="translation_train",
        student_data="translation_train",
        validation="translation_dev",
        student_sample="",
        evaluation="skd_flores_asm_eng",
        scale=LOW_DATA,
        remark="Which 500 rows of devtest are for validation the paper does not say: here the first. "
        "The bundled task scores all 1,012, those among them; the paper the other 512. Prompts "
        "beyond 256 tokens are dropped and counted; the paper does not say what it did with them.",
    ),
    "summarization": Task(
        name="summarization",
        title="dialogue summarisation (DialogSum)",
        max_prompt_tokens=1024,
        max_new_tokens=128,
        steps=375,
        rows=1000,
        teacher_rows=10000,
        teacher_top_p=0.5,
        raw="the release's dialogsum.train.jsonl (12,460 rows) and dialogsum.dev.jsonl",
        split=(),
        train="dialogsum.train.jsonl",
        dev="dialogsum.dev.jsonl",
        options=("--user '{dialogue}' --assistant '{summary}'",),
        teacher_data="summarization_10k",
        teacher_sample=" --sample 10000",
        student_data="summarization_1k",
        validation="summarization_dev",
        student_sample=" --sample 1000",
        evaluation="skd_dialogsum",
        scale=LOW_DATA,
    ),
    "gsm8k": Task(
        name="gsm8k",
        title="arithmetic reasoning (GSM8K)",
        max_prompt_tokens=256,
        max_new_tokens=512,
        steps=375,
        rows=1000,
        teacher_rows=7000,
        raw="the release's train.jsonl (7,473 rows)",
        split=(
            "head -n 7000 train.jsonl > gsm8k_train.jsonl",
            "tail -n 473 train.jsonl > gsm8k_dev.jsonl",
        ),
        train="gsm8k_train.jsonl",
        dev="gsm8k_dev.jsonl",
        options=(r"--user $'Q: {question} \n\nA:' --assistant '{answer}' --remove '<<.*?>>'",),
        teacher_data="gsm8k_7k",
        student_data="gsm8k_1k",
        validation="gsm8k_dev",
        student_sample=" --sample 1000",
        evaluation="skd_gsm8k",
        scale=LOW_DATA,
        remark="Which 473 rows are for validation the paper does not say: here the last. The "
        "calculator's marks <<...>> are taken out of the answers, as in the paper's tables 13 and 14.",
    ),
    "math": Task(
        name="math",
        title="math instruction following (UltraInteract)",
        max_prompt_tokens=1024,
        max_new_tokens=1024,
        steps=375,
        rows=1000,
        teacher_rows=10000,
        raw="the hub's openbmb/UltraInteract_sft",
        split=(
            'python -c \'import datasets as d; d.load_dataset("openbmb/UltraInteract_sft", '
            'split="train").filter(',
            '  lambda row: row["task"] == "Math_CoT").shuffle(seed=42)'
            '.to_json("ultrainteract.jsonl")\'',
            "head -n 10000 ultrainteract.jsonl > ultrainteract_train.jsonl",
            "tail -n +10001 ultrainteract.jsonl | head -n 1000 > ultrainteract_dev.jsonl",
        ),
        train="ultrainteract_train.jsonl",
        dev="ultrainteract_dev.jsonl",
        options=("--user '{instruction}' --assistant '{response}'",),
        teacher_data="math_10k",
        student_data="math_1k",
        validation="math_dev",
        student_sample=" --sample 1000",
        evaluation="skd_math_heldout",
        scale="With 10,000 rows (appendix C): data/math_10k.jsonl, made for the teacher, "
        "max_steps: 7500, num_epochs: 12, eval_steps and save_steps: 1500.",
        task_specific=False,
        remark="Which rows of UltraInteract the paper drew it does not say: here those of its task "
        "Math_CoT, the format of the paper's table 7.",
    ),
}
