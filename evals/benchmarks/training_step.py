"""What a whole training step costs: ours against TRL's GKDTrainer and two steps written by hand.

    python evals/benchmarks/training_step.py --json step.json [--quick] [--profile]

Contenders, on the same models and prompts, completions of equal length, gradient checkpointing on:

- GKD: TRL's GKDTrainer.training_step, on-policy (lmbda = 1), as shipped (under checkpointing it
  generates without a KV cache) and with the cache forced on;
- generate + teacher: plain on-policy KD by hand, full logits;
- published shape: batch-1 cached speculation, a second teacher forward, full logits;
- ours: rollout source, trainer core and fused loss; method `skd` at draft lengths G, `on_policy_kd`.

The losses are asserted: contenders that train on the same tokens agree in the run itself, GKD's and
ours beforehand on one batch of the same tokens.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

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
)
from models import PAIRS, Pair, default_models, left_padded, make_pair
from phases import profile_step
from steps import (
    OurStep,
    StepWork,
    TeacherCalls,
    full_logits_loss,
    gkd_step,
    on_policy_step,
    our_step,
    published_step,
)
from work import SEED, Draft, make_work

from axolotl_skd.rollout.types import AUTO

RATES = (0.6, 0.9)
TOLERANCE = 1e-4  # of losses of the same tokens, relative, in float32
DEFAULT_DRAFT = 5

Times = Mapping[str, Measurement]


class Contenders:
    """The contenders of one batch, each built when it first runs and closed with the stack."""

    def __init__(self, step: StepWork, stack: ExitStack) -> None:
        self._step = step
        self._stack = stack
        self._built: dict[str, Callable[[], Facts]] = {}

    def cell(
        self, name: str, build: Callable[[], Callable[[], Facts]], repeats: int | None = None
    ) -> Cell:
        full_name = f"{name}, {self._step.work.name}"

        def prepare() -> None:
            if full_name not in self._built:
                self._built[full_name] = build()

        settings = {"contender": name, "group": self._step.work.name}
        return Cell(full_name, lambda: self._built[full_name](), settings, prepare, repeats=repeats)

    def gkd(self, force_cache: bool, repeats: int | None = None) -> Cell:
        from gkd import gkd_trainer  # TRL takes seconds to import

        def build() -> Callable[[], Facts]:
            size = len(self._step.sample_ids)
            trainer = self._stack.enter_context(
                gkd_trainer(self._step.pair, self._step.max_new, size, force_cache)
            )
            return gkd_step(self._step, trainer)

        name = "GKD, cache forced" if force_cache else "GKD as shipped"
        return self.cell(name, build, repeats)

    def on_policy(self, repeats: int | None = None) -> Cell:
        return self.cell("generate + teacher", lambda: on_policy_step(self._step), repeats)

    def published(self, rate: float) -> Cell:
        name = f"published shape, a = {rate}"
        return self.cell(name, lambda: published_step(self._step, rate))

    def ours(self, rate: float, draft: Draft, repeats: int | None = None) -> Cell:
        name = f"ours skd, G = {draft}, a = {rate}"
        return self.cell(name, lambda: self.build("skd", rate, draft).run, repeats)

    def ours_on_policy(self, repeats: int | None = None) -> Cell:
        build = lambda: self.build("on_policy_kd", None, 1).run  # noqa: E731
        return self.cell("ours on_policy_kd", build, repeats)

    def build(self, method: str, rate: float | None, draft: Draft) -> OurStep:
        step = self._stack.enter_context(our_step(self._step, method, rate, draft))
        if draft == AUTO:
            step.rollout()  # as in training, where the engine has seen steps before
        return step


def make_step(pair: Pair, num_rows: int, max_new: int) -> StepWork:
    """Rows to train on; the student gets ready for training."""
    pair.student.requires_grad_(True).train()
    pair.student.gradient_checkpointing_enable()
    return StepWork(
        work=make_work(pair, num_rows, max_new),
        sample_ids=torch.arange(num_rows),
        seed=SEED,
        optimizer=torch.optim.AdamW(pair.student.parameters(), lr=0.0),
        teacher_calls=TeacherCalls(pair.teacher),
    )


def check_losses(step: StepWork) -> float:
    """Ours, GKD's and full logits on the same tokens must agree; returns ours.

    Raises:
        AssertionError: they do not.
    """
    from gkd import gkd_trainer

    with ExitStack() as stack, torch.no_grad():
        ours = stack.enter_context(our_step(step, "on_policy_kd", None, 1))
        batch, count = ours.rollout()
        gkd = stack.enter_context(
            gkd_trainer(step.pair, step.max_new, len(step.sample_ids), force_cache=True)
        )
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(batch["input_ids"], lengths, strict=True)]
        ids, mask = left_padded(rows, step.pair.device)
        losses = {
            "ours": ours.trainer.compute_loss(ours.trainer.model, batch),
            "GKD": gkd.compute_loss(gkd.model, batch),
            "full logits": full_logits_loss(step.pair, ids, mask, step.max_new),
        }
    print(f"losses of the same {int(count)} tokens: {_losses_text(losses)}", flush=True)
    if step.pair.exact:
        measured = {
            name: Measurement((0.0,), (0.0,), {"loss": float(loss)})
            for name, loss in losses.items()
        }
        require_close(measured, "loss", TOLERANCE)
    return float(losses["ours"])


def _losses_text(losses: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {float(loss):.6f}" for name, loss in losses.items())


def step_table(cells: Sequence[Cell], measured: Times, reference: str) -> str:
    rows = []
    for cell in cells:
        m = measured[cell.name]
        rows.append(
            [
                cell.settings["contender"],
                f"{m.median:.2f} ({min(m.seconds):.2f}-{max(m.seconds):.2f})",
                m.median / measured[reference].median,
                m.facts["tokens"],
                f"{m.facts['loss']:.5f}",
                m.facts["teacher forwards after the rollout"],
            ]
        )
    header = [
        "step",
        "s (range)",
        "x GKD, cache forced",
        "tokens",
        "loss",
        "teacher forwards after",
    ]
    return markdown_table(header, rows)


def measure(
    bench: Benchmark, step: StepWork, drafts: Sequence[Draft], rates: Sequence[float], full: bool
) -> list[Goal]:
    """One batch size and length: all contenders, or those that matter where a step is long."""
    print(f"\n## {step.work.name}\n", flush=True)
    repeats = None if full else 1
    with ExitStack() as stack:
        make = Contenders(step, stack)
        reference = make.gkd(force_cache=True, repeats=repeats)
        cells = [reference, make.on_policy(repeats), make.ours_on_policy(repeats)]
        if full:
            cells.insert(0, make.gkd(force_cache=False))
        for rate in rates:
            same = [make.ours(rate, draft, repeats) for draft in drafts]
            if full:
                same.append(make.published(rate))
            cells += same
        measured = bench.measure(cells)
    if step.pair.exact:
        for rate in rates:
            same_tokens = {name: m for name, m in measured.items() if f"a = {rate}, " in name}
            require_close(same_tokens, "loss", TOLERANCE)
    print(step_table(cells, measured, reference.name), flush=True)
    return _goals(step, measured, measured[reference.name], drafts, rates)


def _goals(
    step: StepWork,
    measured: Times,
    gkd: Measurement,
    drafts: Sequence[Draft],
    rates: Sequence[float],
) -> list[Goal]:
    bounds = {0.9: 0.5} if step.pair.device.type == "cuda" else {0.6: 1.6, 0.9: 1.15}
    goals, forwards = [], 0
    for rate in rates:
        times = {d: measured[f"ours skd, G = {d}, a = {rate}, {step.work.name}"] for d in drafts}
        forwards += sum(m.facts["teacher forwards after the rollout"] for m in times.values())
        if rate in bounds:
            text = f"step at auto G over GKD's, cache forced, {step.work.name}, a = {rate}"
            goals.append(Goal(text, times[AUTO].median / gkd.median, bounds[rate]))
    goals.append(Goal(f"teacher forwards after our rollouts, {step.work.name}", forwards, 0))
    return goals


def profile(bench: Benchmark, step: StepWork, rates: Sequence[float], draft: Draft) -> None:
    """Print and keep where our step's time goes."""
    bench.extra["profile"] = {}
    for rate in rates:
        with our_step(step, "skd", rate, draft) as ours:
            ours.run()
            seconds = profile_step(ours, step.pair.device)
        total = sum(seconds.values())
        bench.extra["profile"][f"a = {rate}"] = seconds
        print(f"\n## Profile of one step, {step.work.name}, G = {draft}, a = {rate}\n")
        rows = [[name, value, f"{100 * value / total:.1f} %"] for name, value in seconds.items()]
        print(markdown_table(["phase", "s", "share"], [*rows, ["sum", total, ""]]), flush=True)


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", choices=sorted(PAIRS), help="default: cpu; on a GPU gemma")
    parser.add_argument("--profile", action="store_true", help="only: where our step's time goes")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    device = start(args)
    pair = make_pair(args.models or default_models(device), device, args.quick)
    settings = {
        "models": pair.description,
        "gradient checkpointing": "on",
        "optimizer": "AdamW, learning rate 0",
        "clock": "GPU events" if device.type == "cuda" else "process CPU time",
    }
    repeats = 1 if args.quick else args.repeats
    bench = Benchmark("training_step", settings, device, repeats, args.json)
    print(f"# Training steps\n\n{bench.header()}\n", flush=True)
    rates = RATES[:1] if args.quick else RATES
    num_rows, short, long = (2, 6, 12) if args.quick else (8, 32, 256)
    step = make_step(pair, num_rows, short)
    if args.profile:
        profile(bench, step, rates, AUTO)
        bench.write()
        return
    check_losses(step)
    drafts: list[Draft] = [DEFAULT_DRAFT, AUTO] if args.quick else [1, 2, DEFAULT_DRAFT, AUTO]
    bench.goals += measure(bench, step, drafts, rates, full=True)
    if not args.quick:
        long_step = make_step(pair, num_rows, long)
        bench.goals += measure(bench, long_step, [AUTO], rates, full=False)
    bench.write()
    if not args.quick:
        print(f"\n## Goals\n\n{goal_table(bench.goals)}")
    print(f"\n{bench.duration()}")


if __name__ == "__main__":
    main()
