"""Cost and memory of an SKD step on 1, 8 and 64 GPUs, on paper. Nothing here was measured.

    python evals/scaling.py --write README.md

A forward of n tokens over caches of C bytes by a model of N parameters takes the longer of reading and
computing (the roofline of Williams et al., https://doi.org/10.1145/1498765.1498785):

    c(n) = max((2 N + C) / bandwidth, 2 N n / speed)

and a step of B rows a GPU with prompts of P and completions of T tokens, a = acceptance, G = draft,
E = (1 - a^G) / (1 - a) tokens a round, takes

    prefill    c_s(B P) + c_t(B P)
    rollout    T / E x (G c_s(B) + c_t(B G))
    training   (8 N_s B (P + T) + 2 V H_t B T) / speed     checkpointed passes, teacher's head
    optimizer  28 N_s / n / bandwidth                      float32 AdamW; n = 1 where `replicated`
    exchange   2 x 4 N_s / link                            gradients (rings over many GPUs)
    gathering  2 N_t / link                                where `sharded`, before a rollout;
                                                           where `by layer`, in each c_t

Bytes: student 16 N_s (float32 weights, gradients, two moments) + 2 N_s (its bf16 casts), teacher 2 N_t;
caches, stored teacher states and checkpointed layer inputs in bf16. Where the models are:

    replicated   every GPU holds both
    4-bit        the student's 16 N_s spread over all GPUs; an nf4 teacher on each: 9/16 N_t in memory
                 (a float32 scale per 64 weights); a forward reads that, writes 2 N_t and reads it
    sharded      the student's 16 N_s and the teacher spread over all GPUs; beside its parts a GPU
                 gathers both once a step, for the rollout: in between there is room for activations
    by layer     the same, but of the teacher no more than a layer, the head and the embeddings at a
                 time (`distillation.teacher.gather: layers`)

Left out: attention's own products, sampling, launch overhead, ragged lengths, the input pipeline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

START, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
COMMAND = "python evals/scaling.py --write README.md"
GPUS = (1, 8, 64)
REPLICATED, FOUR_BIT, SHARDED, BY_LAYER = PLACEMENTS = (
    "replicated",
    "4-bit",
    "sharded",
    "by layer",
)
NF4 = 0.5 + 4 / 64  # bytes a weight
NODE = 8
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """N parameters, and the sizes of its caches and states."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def weights(self) -> float:
        """Bytes in bf16."""
        return 2 * self.parameters

    @property
    def kv(self) -> float:
        """Bytes of a token's keys and values in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Device:
    """What of a GPU's data sheet is reached: an H100 at 60 % of its bandwidth, 40 % of its speed."""

    bandwidth: float = 0.6 * 3.35e12  # bytes a second
    speed: float = 0.4 * 989e12  # bf16 operations a second
    node_link: float = 0.7 * 450e9  # bytes a second and direction, within a node
    wide_link: float = 0.7 * 50e9  # between nodes
    memory: float = 80e9


@dataclass(frozen=True, slots=True)
class Step:
    """B rows a GPU, all in flight; P, T, G and a of the module's formulas."""

    rows: int = 8
    prompt: int = 256
    completion: int = 512
    draft: int = 5
    acceptance: float = 0.8

    @property
    def tokens_a_round(self) -> float:
        """E."""
        return (1 - self.acceptance**self.draft) / (1 - self.acceptance)


PAIRS = (
    (
        Model("Qwen2.5 0.5B", 0.494e9, 24, 896, 2, 64, 151_936),
        Model("7B", 7.62e9, 28, 3584, 4, 128, 152_064),
    ),
    (
        Model("Gemma-2 2B", 2.61e9, 26, 2304, 4, 256, 256_000),
        Model("27B", 27.2e9, 46, 4608, 16, 128, 256_000),
    ),
    (
        Model("Llama-3.1 8B", 8.03e9, 32, 4096, 8, 128, 128_256),
        Model("70B", 70.6e9, 80, 8192, 8, 128, 128_256),
    ),
)


def forward(model: Model, tokens: float, cache: float, device: Device) -> float:
    """Seconds of one forward.

    Args:
        model: which.
        tokens: n, of all rows together.
        cache: bytes of keys and values that are read.
        device: on which.
    """
    reading = (model.weights + cache) / device.bandwidth
    return max(reading, 2 * model.parameters * tokens / device.speed)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a step: seconds by what they are for, and bytes a GPU."""

    rollout: float
    training: float
    exchange: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.rollout + self.training + self.exchange


def cost(
    student: Model,
    teacher: Model,
    gpus: int,
    placement: str,
    step: Step = Step(),  # noqa: B008
    device: Device = Device(),  # noqa: B008
) -> Cost:
    """What the formulas at the top of this file say."""
    link = device.node_link if gpus <= NODE else device.wide_link
    shared = (gpus - 1) / gpus  # of the bytes that a collective moves, what comes from others
    gathering = shared * teacher.weights / link
    fetching = 0.0  # of a forward's weights
    if placement == FOUR_BIT:
        fetching = (NF4 * teacher.parameters + teacher.weights) / device.bandwidth
    elif placement == BY_LAYER:
        fetching = gathering

    def verify(tokens: float, cache: float) -> float:
        return forward(teacher, tokens, cache, device) + fetching

    # Rows are half written on average.
    read = step.rows * (step.prompt + step.completion / 2)
    prompts = step.rows * step.prompt
    rounds = step.completion / step.tokens_a_round
    rollout = forward(student, prompts, 0, device) + verify(prompts, 0)
    rollout += rounds * step.draft * forward(student, step.rows, read * student.kv, device)
    rollout += rounds * verify(step.rows * step.draft, read * teacher.kv)

    trained = step.rows * (step.prompt + step.completion)
    written = step.rows * step.completion
    products = 8 * student.parameters * trained
    products += 2 * teacher.vocabulary * teacher.hidden * written
    parts = 1 if placement == REPLICATED else gpus
    training = products / device.speed + 28 * student.parameters / parts / device.bandwidth
    # All-reduce, or reduce-scatter and two gathers of bf16 weights: as many bytes.
    exchange = shared * 2 * 4 * student.parameters / link
    if placement == SHARDED:
        exchange += gathering

    asleep = awake = NF4 * teacher.parameters if placement == FOUR_BIT else teacher.weights
    if placement in (SHARDED, BY_LAYER):
        asleep /= gpus
    if placement == SHARDED:
        awake += asleep
    elif placement == BY_LAYER:
        outside = 2 * 2 * teacher.vocabulary * teacher.hidden
        awake = asleep + outside + (teacher.weights - outside) / teacher.layers
    caches = trained * (student.kv + teacher.kv)
    activations = trained * student.layers * student.hidden * 2
    memory = 16 * student.parameters / parts + student.weights + written * teacher.hidden * 2
    memory += max(awake + caches, asleep + activations)
    return Cost(rollout, training, exchange, memory)


def table() -> str:
    """Markdown, between the marks."""
    step, device = Step(), Device()
    rows = [
        f"{START}",
        f"Made by `{COMMAND}`. **Predictions, unmeasured.** {step.rows} rows a GPU, prompts of "
        f"{step.prompt} and completions of {step.completion} tokens, G = {step.draft}, a = "
        f"{step.acceptance}, H100s of {device.memory / 1e9:.0f} GB.",
        "",
        "| pair | GPUs | models | rollout s | training s | exchange s | tokens/s "
        "| GPU-s per 1,000 tokens | GiB a GPU | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for student, teacher in PAIRS:
        for gpus in GPUS:
            for placement in PLACEMENTS if gpus > 1 else (REPLICATED, FOUR_BIT):
                c = cost(student, teacher, gpus, placement)
                rate = gpus * step.rows * step.completion / c.seconds
                values = [
                    f"{student.name} <- {teacher.name}",
                    str(gpus),
                    placement,
                    *(f"{part:.2f}" for part in (c.rollout, c.training, c.exchange)),
                    f"{rate:,.0f}",
                    f"{1000 * gpus / rate:.2f}",
                    f"{c.memory / GIB:.0f}",
                    "yes" if c.memory < device.memory else "**no**",
                ]
                rows.append("| " + " | ".join(values) + " |")
    return "\n".join([*rows, END])


def put_between_marks(text: str) -> str:
    """`text` with the table in the place of what stands between the marks."""
    return text[: text.index(START)] + table() + text[text.index(END) + len(END) :]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", type=Path, help="a file with the marks, e.g. README.md")
    args = parser.parse_args(arguments)
    print(table())
    if args.write:
        args.write.write_text(put_between_marks(args.write.read_text()))


if __name__ == "__main__":
    main()
