"""What a distillation loss through `lm_head` costs: ours against full logits, checkpointing, Liger.

    python evals/benchmarks/loss.py --json loss.json [--quick] [--positions N] [--dtype bfloat16]

Contenders, all from hidden states to the gradients of the student's hidden states and head:

- full logits: plain automatic differentiation over all positions;
- checkpointed chunks: the same in chunks that the backward pass computes a second time;
- Liger: its LigerFusedLinearJSDLoss in eager mode (beta = 0 is its forward KL, with which its hard loss
  comes along at weight 0), in chunks like ours and in its default chunks;
- ours: `fused_token_loss`.

Each run is a process of its own: its peak memory over the inputs, and its time, after a warm-up on a
small vocabulary. Losses and gradients are compared by random projections, in the run itself. The quick
form keeps to one process, save for some runs of ours, so its figures mean nothing.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from harness import (
    Benchmark,
    Cell,
    Facts,
    Goal,
    Measurement,
    argument_parser,
    goal_table,
    markdown_table,
    require_close,
    start,
    timed,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from axolotl_skd.losses.divergences import DIVERGENCES, get_divergence
from axolotl_skd.losses.fused import TeacherTargets, chunk_size, fused_token_loss

VOCABULARIES = (32_000, 128_256, 256_000)  # Llama 2's, Llama 3's, Gemma's
STUDENT_SIZE, TEACHER_SIZE = 256, 768  # of the hidden states
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of loss and gradients, relative
FULL, CHECKPOINTED, LIGER, LIGER_DEFAULT, OURS = (
    "full logits",
    "checkpointed chunks",
    "Liger, our chunks",
    "Liger, its chunks",
    "ours",
)
JSD_BETA, SKEW_ALPHA = 0.5, 0.1
WARM_UP_VOCABULARY, QUICK_VOCABULARY, QUICK_POSITIONS = 64, 512, 32
NUM_PROJECTIONS = 16
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Task:
    """What one process measures."""

    contender: str
    divergence: str
    vocab_size: int
    positions: int
    dtype: str
    threads: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hidden states [N, H] of student and teacher, and their heads; the student's with gradient."""

    student: Tensor
    student_head: nn.Linear
    teacher: Tensor
    teacher_head: nn.Linear


# Contenders: inputs, divergence -> sum of losses


def plain_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def plain_jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student, teacher = _logprobs(student_logits), _logprobs(teacher_logits)
    weights = student.new_tensor([1 - JSD_BETA, JSD_BETA]).log()
    mixture = torch.logaddexp(student + weights[0], teacher + weights[1])
    of_teacher, of_student = (
        functional.kl_div(mixture, each, reduction="none", log_target=True).sum(dim=-1)
        for each in (teacher, student)
    )
    return JSD_BETA * of_teacher + (1 - JSD_BETA) * of_student


def _logprobs(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.float(), dim=-1)


PLAIN = {"forward_kl": plain_forward_kl, "jsd": plain_jsd}


def full_logits(inputs: Inputs, divergence: str) -> Tensor:
    with torch.no_grad():
        teacher_logits = inputs.teacher_head(inputs.teacher)
    return PLAIN[divergence](inputs.student_head(inputs.student), teacher_logits).sum()


def checkpointed_chunks(inputs: Inputs, divergence: str) -> Tensor:
    def chunk_loss(student: Tensor, teacher: Tensor) -> Tensor:
        part = Inputs(student, inputs.student_head, teacher, inputs.teacher_head)
        return full_logits(part, divergence)

    size = chunk_size(inputs.student_head.out_features)
    chunks = zip(inputs.student.split(size), inputs.teacher.split(size), strict=True)
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def liger_in_our_chunks(inputs: Inputs, divergence: str) -> Tensor:
    positions = len(inputs.student)
    num_chunks = -(-positions // chunk_size(inputs.student_head.out_features))
    return liger(inputs, divergence, positions // num_chunks)  # it rounds their number down


def liger(inputs: Inputs, divergence: str, chunk: int | None = None) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    positions = len(inputs.student)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta={"forward_kl": 0.0, "jsd": JSD_BETA}[divergence],
        compiled=False,
        **({} if chunk is None else {"chunk_size": chunk}),
    )
    heads = inputs.student_head.weight, inputs.teacher_head.weight
    labels = torch.zeros(positions, dtype=torch.int64, device=inputs.student.device)
    return positions * loss(inputs.student, heads[0], inputs.teacher, heads[1], labels)


def ours(inputs: Inputs, divergence: str) -> Tensor:
    head, teacher = inputs.student_head, TeacherTargets(inputs.teacher, inputs.teacher_head)
    loss = get_divergence(divergence, beta=JSD_BETA, alpha=SKEW_ALPHA, temperature=1.0)
    size = chunk_size(head.out_features)
    return fused_token_loss(
        inputs.student, head, head, loss, lambda part: (teacher.logits(part),), size
    )[0]


CONTENDERS: dict[str, Callable[[Inputs, str], Tensor]] = {
    FULL: full_logits,
    CHECKPOINTED: checkpointed_chunks,
    LIGER: liger_in_our_chunks,
    LIGER_DEFAULT: liger,
    OURS: ours,
}


# One process


def run_task(task: Task, device: torch.device) -> Facts:
    """Time, peak memory, loss and projected gradients of one contender."""
    contender = CONTENDERS[task.contender]

    def step(inputs: Inputs) -> Facts:
        loss = contender(inputs, task.divergence)
        loss.backward()
        return {"loss": loss.detach()}

    # Code that is loaded on first use counts neither as time nor as memory.
    step(make_inputs(replace(task, vocab_size=WARM_UP_VOCABULARY), device))
    inputs = make_inputs(task, device)
    before = _peak(device)
    seconds, wall, facts = timed(lambda: step(inputs), device)
    peak = _peak(device) - before
    return {
        "seconds": seconds,
        "wall_seconds": wall,
        "peak_mib": peak / MIB,
        "loss": float(facts["loss"]),
        "gradient of hidden states": _projections(inputs.student.grad),
        "gradient of the head": _projections(inputs.student_head.weight.grad),
    }


def make_inputs(task: Task, device: torch.device) -> Inputs:
    """The same numbers for every contender; logits of a few units, as those of language models."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, task.dtype)

    def states(size: int) -> Tensor:
        drawn = torch.randn(task.positions, size, generator=generator)
        return drawn.to(device, dtype)

    def head(size: int) -> nn.Linear:
        # In its own dtype from the start: a passing copy in another would count as held already.
        module = nn.utils.skip_init(nn.Linear, size, task.vocab_size, bias=False, dtype=dtype)
        bound = 3 / size**0.5
        with torch.no_grad():
            module.weight.uniform_(-bound, bound, generator=generator)
        return module.to(device)

    student, teacher = states(STUDENT_SIZE).requires_grad_(), states(TEACHER_SIZE)
    return Inputs(student, head(STUDENT_SIZE), teacher, head(TEACHER_SIZE).requires_grad_(False))


def _peak(device: torch.device) -> int:
    """The most bytes that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _projections(gradient: Tensor) -> list[float]:
    """A matrix between random signs: matrices that differ give lists that differ as much."""
    generator = torch.Generator().manual_seed(1)

    def signs(size: int) -> Tensor:
        drawn = torch.randint(2, (size, NUM_PROJECTIONS), generator=generator)
        return (2 * drawn - 1).to(gradient.device, torch.float32)

    rows, columns = (signs(size) for size in gradient.shape)
    return (rows * (gradient.float() @ columns)).sum(dim=0).tolist()


# The command


class OwnProcesses(Benchmark):
    """Cells that time themselves, since they do not run in this process."""

    def _run_once(self, cell: Cell, known: Measurement | None) -> Measurement:
        facts = dict(cell.run())
        seconds, wall = facts.pop("seconds"), facts.pop("wall_seconds")
        before = ((), ()) if known is None else (known.seconds, known.wall)
        if known is not None:
            facts["peak_mib"] = max(facts["peak_mib"], known.facts["peak_mib"])
        print(f"  {cell.name}: {seconds:.3f} s", file=sys.stderr, flush=True)
        return Measurement((*before[0], seconds), (*before[1], wall), facts)


@dataclass(frozen=True, slots=True)
class Group:
    """Contenders that are compared with the first of them.

    Attributes:
        title: of the table.
        tasks: by the name of their row.
        same: whether they compute the same.
        has_goals: for the last of them.
    """

    title: str
    tasks: dict[str, Task]
    same: bool = True
    has_goals: bool = False


def make_groups(args: Namespace, positions: int) -> list[Group]:
    vocabularies = (QUICK_VOCABULARY,) if args.quick else VOCABULARIES

    def task(contender: str, divergence: str, vocab_size: int) -> Task:
        return Task(contender, divergence, vocab_size, positions, args.dtype, args.threads)

    def group(divergence: str, vocab_size: int, *contenders: str, has_goals: bool = False) -> Group:
        tasks = {name: task(name, divergence, vocab_size) for name in contenders}
        return Group(f"{divergence}, V = {vocab_size:,}", tasks, has_goals=has_goals)

    small, middle = vocabularies[0], vocabularies[len(vocabularies) // 2]
    first = group("forward_kl", small, FULL).tasks | {
        name: task(OURS, name, small) for name in DIVERGENCES
    }
    every = FULL, CHECKPOINTED, LIGER, OURS
    return [
        *(
            group("forward_kl", v, *every, has_goals=v == vocabularies[-1])
            for v in reversed(vocabularies)
        ),
        group("jsd", middle, FULL, LIGER, LIGER_DEFAULT, OURS),
        Group(f"ours, every divergence, V = {small:,}", first, same=False),
    ]


def make_cell(title: str, row: str, task: Task, run: Callable[[Task], Facts]) -> Cell:
    settings = {"contender": row, "group": title, **asdict(task)}
    return Cell(f"{row}, {title}", lambda: run(task), settings)


def in_own_process(task: Task) -> Facts:
    command = [sys.executable, __file__, "--task", json.dumps(asdict(task))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def check_agreement(measured: dict[str, Measurement], tolerance: float) -> None:
    """
    Raises:
        AssertionError: losses or gradients of two contenders differ.
    """
    require_close(measured, "loss", tolerance)
    first_name, first = next(iter(measured.items()))
    for what in ("gradient of hidden states", "gradient of the head"):
        expected = torch.tensor(first.facts[what])
        for name, measurement in measured.items():
            difference = torch.tensor(measurement.facts[what]) - expected
            error = float(difference.norm() / expected.norm())
            if not error <= tolerance:
                raise AssertionError(
                    f"{what} of {name!r} differs from that of {first_name!r} by {error:.1e} "
                    f"(allowed {tolerance:.1e}): their times must not be compared"
                )


def table(measured: Sequence[Measurement], rows: Sequence[str]) -> str:
    full = measured[0]
    return markdown_table(
        ["", "memory / full logits", "time / full logits", "MiB", "s", "min - max"],
        [
            [
                row,
                _ratio(m.facts["peak_mib"], full.facts["peak_mib"]),
                _ratio(m.median, full.median),
                m.facts["peak_mib"],
                m.median,
                f"{min(m.seconds):.3g} - {max(m.seconds):.3g}",
            ]
            for row, m in zip(rows, measured, strict=True)
        ],
    )


def _ratio(value: float, reference: float) -> float:
    return value / max(reference, 1e-9)  # sizes so small that no page was touched


def goals(title: str, full: Measurement, mine: Measurement) -> list[Goal]:
    memory = _ratio(mine.facts["peak_mib"], full.facts["peak_mib"])
    return [
        Goal(f"ours: memory / full logits, {title}", memory, 0.35),
        Goal(f"ours: time / full logits, {title}", _ratio(mine.median, full.median), 1.1),
    ]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--positions", type=int, default=512, help="tokens of the loss, N")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--task", type=json.loads, help="only: measure this one, in this process")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.task is not None:
        task = Task(**args.task)
        args.threads = task.threads
        print(json.dumps(run_task(task, start(args))))
        return
    device = start(args)
    positions = QUICK_POSITIONS if args.quick else args.positions
    settings = {
        "models": f"heads of V x {STUDENT_SIZE} parameters (student) and V x {TEACHER_SIZE} "
        f"(teacher), {args.dtype}",
        "positions": positions,
        "clock": "GPU events" if device.type == "cuda" else "process CPU time",
        "memory": "peak over the inputs, "
        + ("allocated on the GPU" if device.type == "cuda" else "resident set"),
    }
    bench = OwnProcesses("loss", settings, device, 1 if args.quick else args.repeats, args.json)
    print(f"# Losses\n\n{bench.header()}\n", flush=True)

    def separate(row: str) -> bool:
        return row == OURS or not args.quick

    for group in make_groups(args, positions):
        cells = [
            make_cell(
                group.title,
                row,
                task,
                in_own_process if separate(row) else partial(run_task, device=device),
            )
            for row, task in group.tasks.items()
        ]
        measured = bench.measure(cells)
        if group.same:
            check_agreement(measured, TOLERANCE[args.dtype])
        print(
            f"## {group.title}\n\n{table(list(measured.values()), list(group.tasks))}\n", flush=True
        )
        if group.has_goals:
            bench.goals += goals(group.title, *(measured[c.name] for c in (cells[0], cells[-1])))
    bench.write()
    if not args.quick:
        print(f"## Goals\n\n{goal_table(bench.goals)}\n")
    print(bench.duration())


if __name__ == "__main__":
    main()
