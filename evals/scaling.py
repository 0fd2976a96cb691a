"""Cost and memory of an SKD step on 1, 8 and 64 GPUs, on paper. Nothing here was measured.

    python evals/scaling.py --write README.md

A model of hidden size h and vocabulary V has L weights in its decoder's linear layers and N = L + 2 V h
in all, L + V h where embeddings and head are tied. s is the student, t the teacher. A forward of n
tokens over caches of C bytes takes the longer of reading and computing (the roofline of Williams et
al., https://doi.org/10.1145/1498765.1498785):

    c(n) = max((2 (L + V h) + C) / bandwidth, 2 (L + V h) n / speed)

On R GPUs, x = (R - 1) / R, with S of them sharing the student's states, a step of B rows a GPU with
prompts of P and completions of T tokens, a = acceptance, G = draft, E = (1 - a^G) / (1 - a) tokens a
round, takes these seconds:

    rollout    c_s(B P) + c_t(B P) + T / E (G c_s(B) + c_t(B G))
    training   (8 L_s B (P + T) + (6 V h_s + 2 V h_t) B T) / speed       layers are recomputed
               + 28 N_s / S / bandwidth                                  float32 AdamW
    exchange   8 N_s x / link              float32 gradients, or those and bf16 weights twice
               + 2 N_s x / link            if S > 1: the student for its rollout

and on each GPU, beside 2 h_t B T of stored teacher states, the larger of these bytes:

    rollout    12 N_s / S + 2 N_s          float32 weights and two moments; in bf16, whole
               + teacher + ((z + 2) / 4 kv_s + kv_t) B (P + T)
               + 2 (12 h_t + 4 i_t) B P + 2 V B G       a layer's work on the prompts; logits
    training   16 N_s / S + teacher        gradients too
               + 2 N_s or, if S > 1, 2 (V h_s + L_s / layers_s)          in bf16
               + 4 N_s                     gradients to be sent, if S = 1 < R
               + (z layers_s h_s + 2 (12 h_s + 4 i_s)) B (P + T)         inputs of all, work of one
               + 10 V h_s + 6 K            head's gradient: sum, multiple, cast; K logits thrice

kv are the bytes of a token's keys and values in bf16, i is the MLP's size, z = 4 if S = 1 (autocast
of float32 weights leaves the residual stream and rotated keys in float32), else 2. By where the models
are:

                 S   teacher in rollout and training      seconds more
    replicated   1   2 N_t                                none
    4-bit        R   q L_t + 2 (N_t - L_t)                in each c_t (q + 2) L_t / bandwidth
    sharded      R   2 N_t / R + 2 N_t in the rollout,    2 N_t x / link
                     2 N_t / R + 2 V h_t in training
    by layer     R   2 N_t / R + 2 (N_t - L_t             2 (N_t - L_t) x / link,
                     + L_t / layers_t) in the rollout,    in each c_t 2 L_t x / link
                     2 N_t / R + 2 V h_t in training

`4-bit` is nf4 with double quantisation, on every GPU, unpacked to bf16 in each forward; embeddings and
head stay in bf16. `sharded` gathers both models once a step, for the rollout; `by layer` the teacher's
layers in every forward (`distillation.teacher.gather: layers`). Left out: attention's products,
sampling, launch overhead, ragged lengths, the input pipeline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from axolotl_skd.losses.fused import CHUNK_ELEMENTS

START, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
COMMAND = "python evals/scaling.py --write README.md"
FORMULAS = __doc__.split(COMMAND)[1].strip()
GPUS = (1, 8, 64)
NODE = 8
REPLICATED, FOUR_BIT, SHARDED, BY_LAYER = PLACEMENTS = (
    "replicated",
    "4-bit",
    "sharded",
    "by layer",
)
# q, bytes a weight: a byte of scale per 64 of them, and a float32 scale per 256 of those.
NF4 = 0.5 + (1 + 4 / 256) / 64
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with grouped-query attention and a gated MLP."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False

    @property
    def linear(self) -> int:
        """L."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_size * self.hidden
        return self.layers * (attention + 3 * self.inner * self.hidden)

    @property
    def head(self) -> int:
        """V h."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """N, without norms and biases."""
        return self.linear + (1 if self.tied else 2) * self.head

    @property
    def kv(self) -> int:
        """Bytes of a token's keys and values in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    @property
    def work(self) -> int:
        """Bytes of what one layer computes per token, in bf16."""
        return 2 * (12 * self.hidden + 4 * self.inner)


class Rate(NamedTuple):
    """What a data sheet says, a second, and the share of it that is reached."""

    peak: float
    share: float

    @property
    def reached(self) -> float:
        return self.peak * self.share


@dataclass(frozen=True, slots=True)
class Device:
    """An H100."""

    bandwidth: Rate = Rate(3.35e12, 0.6)  # bytes
    speed: Rate = Rate(989e12, 0.4)  # operations in bf16
    node_link: Rate = Rate(450e9, 0.7)  # bytes and direction, within a node
    wide_link: Rate = Rate(50e9, 0.7)  # between nodes
    memory: float = 80e9
    reserve: float = 0.05  # share of the memory for the CUDA context, NCCL and the allocator


@dataclass(frozen=True, slots=True)
class Step:
    """B rows a GPU, all in flight and one micro-batch; P, T, G and a of the formulas."""

    rows: int = 8
    prompt: int = 256
    completion: int = 512
    draft: int = 5
    acceptance: float = 0.8

    @property
    def tokens_a_round(self) -> float:
        """E."""
        return (1 - self.acceptance**self.draft) / (1 - self.acceptance)


@dataclass(frozen=True, slots=True)
class Run:
    """Who trains from whom, on how many GPUs (R), and where the models are."""

    student: Model
    teacher: Model
    gpus: int
    placement: str
    step: Step = Step()
    device: Device = Device()

    @property
    def sharing(self) -> int:
        """S."""
        return 1 if self.placement == REPLICATED else self.gpus

    @property
    def stream(self) -> int:
        """z."""
        return 4 if self.sharing == 1 else 2

    @property
    def student_kv(self) -> float:
        """Bytes of a token's keys and values."""
        return (self.stream + 2) / 4 * self.student.kv

    def moving(self, size: float) -> float:
        """Seconds in which each GPU gets so many bytes, of which it has its own part."""
        link = self.device.node_link if self.gpus <= NODE else self.device.wide_link
        return size * (self.gpus - 1) / self.gpus / link.reached


class Seconds(NamedTuple):
    """Of a step."""

    rollout: float
    training: float
    exchange: float


class Bytes(NamedTuple):
    """On each GPU."""

    rollout: float
    training: float


def seconds(run: Run) -> Seconds:
    """The first three sums of the formulas."""
    student, teacher, step = run.student, run.teacher, run.step
    bandwidth, speed = run.device.bandwidth.reached, run.device.speed.reached
    spread = run.sharing > 1
    in_forwards = once = 0.0
    if run.placement == FOUR_BIT:
        in_forwards = (NF4 + 2) * teacher.linear / bandwidth
    elif run.placement == SHARDED:
        once = run.moving(2 * teacher.parameters)
    elif run.placement == BY_LAYER:
        once = run.moving(2 * (teacher.parameters - teacher.linear))
        in_forwards = run.moving(2 * teacher.linear)

    def forward(model: Model, tokens: int, caches: float = 0.0) -> float:
        weights = model.linear + model.head
        return max((2 * weights + caches) / bandwidth, 2 * weights * tokens / speed)

    cached = step.rows * (step.prompt + step.completion / 2)  # rows are half written on average
    rounds = step.completion / step.tokens_a_round
    rollout = sum(forward(model, step.rows * step.prompt) for model in (student, teacher))
    rollout += rounds * step.draft * forward(student, step.rows, cached * run.student_kv)
    rollout += rounds * forward(teacher, step.rows * step.draft, cached * teacher.kv)
    rollout += (1 + rounds) * in_forwards

    operations = 8 * student.linear * step.rows * (step.prompt + step.completion)
    operations += (6 * student.head + 2 * teacher.head) * step.rows * step.completion
    training = operations / speed + 28 * student.parameters / run.sharing / bandwidth
    exchange = run.moving((10 if spread else 8) * student.parameters) + once
    return Seconds(rollout, training, exchange)


def teacher_bytes(run: Run) -> Bytes:
    """The last of the formulas."""
    teacher = run.teacher
    outside = teacher.parameters - teacher.linear
    if run.placement == REPLICATED:
        return Bytes(2 * teacher.parameters, 2 * teacher.parameters)
    if run.placement == FOUR_BIT:
        packed = NF4 * teacher.linear + 2 * outside
        return Bytes(packed, packed)
    part = 2 * teacher.parameters / run.gpus
    gathered = teacher.parameters
    if run.placement == BY_LAYER:
        gathered = outside + teacher.linear / teacher.layers
    return Bytes(part + 2 * gathered, part + 2 * teacher.head)


def memory(run: Run) -> Bytes:
    """The sums of bytes, and the stored states."""
    student, teacher, step, of_teacher = run.student, run.teacher, run.step, teacher_bytes(run)
    tokens = step.rows * (step.prompt + step.completion)
    states = 2 * teacher.hidden * step.rows * step.completion
    spread = run.sharing > 1

    rollout = 12 * student.parameters / run.sharing + 2 * student.parameters
    rollout += of_teacher.rollout + (run.student_kv + teacher.kv) * tokens
    rollout += teacher.work * step.rows * step.prompt
    rollout += 2 * teacher.vocabulary * step.rows * step.draft

    training = 16 * student.parameters / run.sharing + of_teacher.training
    at_a_time = student.head + student.linear / student.layers if spread else student.parameters
    training += 2 * at_a_time
    if run.gpus > 1 and not spread:
        training += 4 * student.parameters
    inputs = run.stream * student.layers * student.hidden
    training += (inputs + student.work) * tokens
    training += 10 * student.head + 6 * CHUNK_ELEMENTS
    return Bytes(states + rollout, states + training)


def fits(run: Run) -> bool:
    """Is the memory enough, and the reserve left?"""
    return max(memory(run)) <= (1 - run.device.reserve) * run.device.memory


PAIRS = (
    (
        Model("Qwen2.5 0.5B", 24, 896, 4864, 14, 2, 64, 151_936, tied=True),
        Model("7B", 28, 3584, 18_944, 28, 4, 128, 152_064),
    ),
    (
        Model("Gemma-2 2B", 26, 2304, 9216, 8, 4, 256, 256_000, tied=True),
        Model("27B", 46, 4608, 36_864, 32, 16, 128, 256_000, tied=True),
    ),
    (
        Model("Llama-3.1 8B", 32, 4096, 14_336, 32, 8, 128, 128_256),
        Model("70B", 80, 8192, 28_672, 64, 8, 128, 128_256),
    ),
)
MORE_ROWS = (32, 64, 128)


def assumptions(step: Step, device: Device) -> str:
    """Markdown."""
    speed, bandwidth = device.speed, device.bandwidth
    return (
        f"Assumed: B = {step.rows}, P = {step.prompt}, T = {step.completion}, G = {step.draft}, "
        f"a = {step.acceptance}, q = {NF4:.3f}, K = {CHUNK_ELEMENTS / 1e6:.1f}e6; H100s, of whose "
        f"{bandwidth.peak / 1e12:g} TB/s {bandwidth.share:.0%} are reached, of "
        f"{speed.peak / 1e12:g} Tflop/s in bf16 {speed.share:.0%}, and of links of "
        f"{device.node_link.peak / 1e9:g} GB/s within a node of {NODE} and "
        f"{device.wide_link.peak / 1e9:g} GB/s a GPU between nodes {device.node_link.share:.0%}. "
        f"What fits leaves {device.reserve:.0%} of {device.memory / 1e9:g} GB to the CUDA context, "
        f"NCCL and the allocator: {(1 - device.reserve) * device.memory / GIB:.1f} GiB."
    )


def more_rows(run: Run) -> str:
    """Markdown: where a verification begins to compute for longer than it reads."""
    knee = run.device.speed.reached / run.device.bandwidth.reached
    times = [sum(seconds(replace(run, step=replace(run.step, rows=n)))) for n in MORE_ROWS]
    now = sum(seconds(run))
    return (
        f"Without caches to read, computing takes longer than reading from speed / bandwidth = "
        f"{knee:.0f} tokens on: a verification of {knee / run.step.draft:.0f} rows. With "
        f"{' / '.join(map(str, MORE_ROWS))} rows a GPU instead of {run.step.rows} a step of "
        f"{run.student.name} <- {run.teacher.name}, {run.placement}, takes "
        f"{' / '.join(f'{time / now:.1f}' for time in times)} times as long."
    )


def table() -> str:
    """Markdown, between the marks."""
    rows = [
        "| pair | GPUs | models | rollout s | training s | exchange s | GPU-s per 1,000 tokens "
        "| GiB, rollout | GiB, training | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for student, teacher in PAIRS:
        for gpus in GPUS:
            for placement in PLACEMENTS if gpus > 1 else (REPLICATED, FOUR_BIT):
                run = Run(student, teacher, gpus, placement)
                takes = seconds(run)
                tokens = run.step.rows * run.step.completion
                values = [
                    f"{student.name} <- {teacher.name}",
                    str(gpus),
                    placement,
                    *(f"{part:.2f}" for part in takes),
                    f"{1000 * sum(takes) / tokens:.2f}",
                    *(f"{size / GIB:.0f}" for size in memory(run)),
                    "yes" if fits(run) else "**no**",
                ]
                rows.append("| " + " | ".join(values) + " |")
    parts = [
        f"{START}",
        f"Written by `{COMMAND}`. **Predictions, unmeasured.**",
        FORMULAS,
        assumptions(Step(), Device()),
        "\n".join(rows),
        more_rows(Run(*PAIRS[0], 1, REPLICATED)),
    ]
    return "\n\n".join(parts) + f"\n{END}"


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
