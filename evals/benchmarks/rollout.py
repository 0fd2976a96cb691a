"""How fast rollouts are made: the engine against its peers and against the floor of its own forwards.

    python evals/benchmarks/rollout.py --json rollout.json [--quick] [--models cpu|gemma|qwen2]

Contenders, each delivering completions and the teacher's hidden states at their positions:

- naive: SKD's Algorithm 1, uncached, one row at a time; then a teacher forward per row;
- batch 1 + teacher: the same on stock caches (the published code's shape);
- generate + teacher: plain on-policy KD, transformers' `generate` and one teacher forward;
- GKD: generation as TRL's GKDTrainer does it, as shipped (no KV cache) and with the cache forced on,
  and one teacher forward;
- ours: the rollout engine at fixed draft lengths G and at `auto`, all after an untimed run.

Acceptance a is simulated, but for the embedded tiny pair's. Naive and batch 1 draft 5 tokens. Random
pairs never stop before the limit. All contenders that interleave must make the same tokens in float32,
whatever their G, batch and cache; that is asserted in the same run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from contenders import batch1, gkd, naive, on_policy, ours
from floor import Round, cost_cells, floor_seconds
from harness import (
    Benchmark,
    Cell,
    Goal,
    Measurement,
    argument_parser,
    goal_table,
    markdown_table,
    require_equal,
    start,
)
from models import PAIRS, Pair, default_models, make_pair, skewed_lengths
from work import PROMPT_TOKENS, PUBLISHED_DRAFT, Draft, Work, make_work, tiny_work

from axolotl_skd.rollout.types import AUTO

Times = Mapping[str, Measurement]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        rates: of simulated acceptance.
        drafts: fixed draft lengths.
        short, long: completion tokens.
        batch, large_batch: rows.
        skewed: rows, rows in flight, shortest and longest completion.
        tiny_rows: of the embedded pair.
    """

    rates: tuple[float, ...] = (0.3, 0.6, 0.9)
    drafts: tuple[int, ...] = (1, 2, 3, 5, 8)
    short: int = 32
    long: int = 512
    batch: int = 8
    large_batch: int = 32
    skewed: tuple[int, int, int, int] = (32, 8, 16, 256)
    tiny_rows: int = 32

    @property
    def middle_rate(self) -> float:
        return self.rates[len(self.rates) // 2]

    def ours(self) -> list[Draft]:
        return [*self.drafts, AUTO]


QUICK = Plan(
    rates=(0.6,),
    drafts=(1, 5),
    short=6,
    long=12,
    batch=2,
    large_batch=3,
    skewed=(4, 2, 2, 8),
    tiny_rows=2,
)


# Groups


def measure(bench: Benchmark, work: Work, cells: Sequence[Cell]) -> Times:
    """Run a group, assert that its SKD contenders agree, print its table."""
    print(f"\n## {work.name}\n", flush=True)
    measured = bench.measure(cells)
    if work.pair.exact:
        for rate in {cell.settings["acceptance"] for cell in cells}:
            same = [c.name for c in cells if c.settings["acceptance"] == rate and _interleaves(c)]
            require_equal({name: measured[name] for name in same}, "digest")
    print(throughput_table(cells, measured), flush=True)
    return measured


def _interleaves(cell: Cell) -> bool:
    return cell.settings["contender"].startswith(("naive", "batch 1", "ours"))


def throughput_table(cells: Sequence[Cell], measured: Times) -> str:
    """Tokens per second, median and range, by contender and acceptance."""
    rates = sorted({c.settings["acceptance"] for c in cells} - {None})
    columns = rates or [None]
    rows: dict[str, dict[float | None, str]] = {}
    for cell in cells:
        row = rows.setdefault(cell.settings["contender"], {})
        rate = cell.settings["acceptance"]
        for column in columns if rate is None else [rate]:
            row[column] = _throughput_text(measured[cell.name])
    header = ["tokens/s", *(_rate_text(rate) for rate in columns)]
    return markdown_table(
        header, [[name, *(row.get(c) for c in columns)] for name, row in rows.items()]
    )


def _rate_text(rate: float | None) -> str:
    return "median (range)" if rate is None else f"a = {rate}"


def _throughput_text(measurement: Measurement) -> str:
    tokens, seconds = measurement.facts["tokens"], measurement.seconds
    slowest, fastest = tokens / max(seconds), tokens / min(seconds)
    return f"{throughput(measurement):.1f} ({slowest:.1f}-{fastest:.1f})"


def throughput(measurement: Measurement) -> float:
    """Completion tokens per second of the median run."""
    return measurement.facts["tokens"] / measurement.median


def main_group(bench: Benchmark, work: Work, plan: Plan, with_naive: bool) -> Times:
    """All contenders at all rates."""
    with ExitStack() as stack:
        cells = [
            on_policy(work),
            gkd(work, stack, force_cache=False),
            gkd(work, stack, force_cache=True),
        ]
        for rate in plan.rates:
            if with_naive:
                cells.append(naive(work, rate))
            cells.append(batch1(work, rate))
            cells += [ours(work, rate, draft) for draft in plan.ours()]
        return measure(bench, work, cells)


def large_group(
    bench: Benchmark, work: Work, rate: float, drafts: Sequence[Draft], repeats: int | None
) -> Times:
    """The contenders that matter, at one rate, where a run is long."""
    with ExitStack() as stack:
        cells = [
            on_policy(work, repeats=repeats),
            gkd(work, stack, force_cache=True, repeats=repeats),
            *(ours(work, rate, draft, repeats=repeats) for draft in drafts),
        ]
        return measure(bench, work, cells)


def skewed_group(
    bench: Benchmark, pair: Pair, plan: Plan, draft: Draft, repeats: int | None
) -> Times:
    """Rows of very different lengths: refilled, in batches one after the other, and the peer."""
    num_rows, in_flight, shortest, longest = plan.skewed
    lengths = skewed_lengths(num_rows, shortest, longest)
    name = f"{num_rows} rows of {shortest} to {longest} tokens, {in_flight} in flight"
    work, rate = make_work(pair, num_rows, lengths, name), plan.middle_rate
    cells = [
        on_policy(work, in_flight, repeats),
        *(
            ours(work, rate, draft, batch_size=in_flight, refill=refill, repeats=repeats)
            for refill in (False, True)
        ),
    ]
    return measure(bench, work, cells)


def tiny_group(bench: Benchmark, work: Work, plan: Plan) -> Times:
    """Real acceptance."""
    cells = [on_policy(work), batch1(work, None), *(ours(work, None, d) for d in plan.ours())]
    measured = measure(bench, work, cells)
    rate = measured[cells[-1].name].facts["own share"]
    print(f"\nshare of tokens that are the student's own: {rate:.2f}")
    return measured


def floor_group(bench: Benchmark, work: Work, plan: Plan, times: Times) -> list[Goal]:
    """Rollouts against the forwards that they consist of."""
    num_rows = len(work.prompts.ids)
    rollouts = {
        (rate, draft): times[ours(work, rate, draft).name]
        for rate in plan.rates
        for draft in (PUBLISHED_DRAFT, AUTO)
    }
    rounds: dict[tuple[float, Draft], dict[Round, int]] = {
        key: {(rows, size): count for rows, size, count in m.facts["rounds"]}
        for key, m in rollouts.items()
    }
    prompt = sum(map(len, work.prompts.ids)) // num_rows
    kinds = [kind for counts in rounds.values() for kind in counts]
    print(f"\n## Floor of {work.name}\n", flush=True)
    costs = bench.measure(
        cost_cells(work.pair, kinds, num_rows, prompt, context=prompt + plan.short // 2)
    )
    rows, goals = [], []
    for (rate, draft), rollout in rollouts.items():
        floor = floor_seconds(costs, rounds[rate, draft], num_rows)
        ratio = rollout.median / floor
        count = sum(rounds[rate, draft].values())
        rows.append([rate, draft, count, rollout.median, floor, ratio])
        goals.append(Goal(f"rollout over its floor, a = {rate}, G = {draft}", ratio, 1.10))
    print(markdown_table(["a", "G", "rounds", "rollout s", "floor s", "rollout / floor"], rows))
    return goals


# Goals


def batch1_goals(work: Work, plan: Plan, times: Times, on_gpu: bool) -> list[Goal]:
    """Against the published code's shape, and of `auto` against the best fixed draft length."""
    goals = []
    for rate in plan.rates:
        fixed = {d: throughput(times[ours(work, rate, d).name]) for d in plan.drafts}
        best = max(fixed, key=fixed.__getitem__)
        chosen = throughput(times[ours(work, rate, AUTO).name])
        text = f"speed of auto G over the best fixed (G = {best}), a = {rate}"
        goals.append(Goal(text, chosen / fixed[best], 0.97, at_most=False))
        ratio = chosen / throughput(times[batch1(work, rate).name])
        bound = 6.0 if on_gpu else 3.0 if rate <= 0.6 else 2.5
        text = f"speed over batch 1 + teacher, {work.name}, a = {rate}"
        goals.append(Goal(text, ratio, bound, at_most=False))
    return goals


def best_fixed(work: Work, plan: Plan, times: Times) -> int:
    """The fastest fixed draft length at the middle rate."""
    rate = plan.middle_rate
    return max(plan.drafts, key=lambda d: throughput(times[ours(work, rate, d).name]))


# Command


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", choices=sorted(PAIRS), help="default: cpu; on a GPU gemma")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    device = start(args)
    on_gpu = device.type == "cuda"
    plan = QUICK if args.quick else Plan()
    pair = make_pair(args.models or default_models(device), device, args.quick)
    settings = {
        "models": pair.description,
        "prompt tokens": "{} to {}".format(*PROMPT_TOKENS),
        "sampling": "student T 0.5, top-p 0.5; teacher T 0.2; K = 25; GKD T 0.9, top-p 1",
        "clock": "GPU events" if on_gpu else "process CPU time",
    }
    repeats = 1 if args.quick else args.repeats
    bench = Benchmark("rollout", settings, device, repeats, args.json)
    print(f"# Rollouts\n\n{bench.header()}", flush=True)

    slow = None if on_gpu else 1  # minutes each on a CPU
    single = make_work(pair, 1, plan.short)
    main_group(bench, single, plan, with_naive=True)
    work = make_work(pair, plan.batch, plan.short)
    times = main_group(bench, work, plan, with_naive=False)
    bench.goals += floor_group(bench, work, plan, times)
    bench.goals += batch1_goals(work, plan, times, on_gpu)

    rate, best = plan.middle_rate, best_fixed(work, plan, times)
    drafts: list[Draft] = [best, AUTO]
    large_group(bench, make_work(pair, plan.large_batch, plan.short), rate, drafts, None)
    large_group(bench, make_work(pair, plan.batch, plan.long), rate, drafts, slow)
    if on_gpu:
        many = make_work(pair, 8 * plan.batch, plan.short)
        name = ours(many, rate, drafts[-1]).name
        wide = large_group(bench, many, rate, drafts, None)[name]
        ratio = throughput(wide) / throughput(times[ours(work, rate, drafts[-1]).name])
        text = f"throughput of {8 * plan.batch} rows over that of {plan.batch}, a = {rate}"
        bench.goals.append(Goal(text, ratio, 4.0, at_most=False))
    skewed_group(bench, pair, plan, drafts[-1], slow)
    tiny_group(bench, tiny_work(device, plan.tiny_rows, 80), plan)

    bench.write()
    if not args.quick:
        print(f"\n## Goals\n\n{goal_table(bench.goals)}")
    print(f"\n{bench.duration()}")


if __name__ == "__main__":
    main()
