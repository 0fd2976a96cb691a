"""`axolotl skd ...`: subcommands of Axolotl's own command line (entry point `axolotl.cli_commands`).

Heavy imports stay inside the functions, or every `axolotl` command would pay for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from axolotl_skd.draft_report.options import ReportOptions
from axolotl_skd.evaluation.score_files import METRICS


@click.group()
def skd() -> None:
    """Speculative Knowledge Distillation: keys, data, bundled files, evaluation, scores, drafts."""


@skd.command()
@click.argument("name", type=click.Choice(["evals", "examples"]))
def path(name: str) -> None:
    """Print where the bundled lm-eval tasks or example configs are."""
    from axolotl_skd.resources import resource_path

    click.echo(resource_path("evals" if name == "evals" else "example_configs"))


@skd.command()
def keys() -> None:
    """Print all keys of the `distillation:` block as a Markdown table."""
    from axolotl_skd.key_table import key_table

    click.echo(key_table())


@skd.command("to-chat")
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--user", required=True, help="User turn, e.g. '{question}': fields in braces.")
@click.option("--assistant", help="Assistant turn, e.g. '{answer}'; without it, prompts alone.")
@click.option("--remove", multiple=True, help="Regular expression to take out of the answers.")
@click.option("--sample", type=click.IntRange(min=1), help="Only so many rows, at random.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of the sample.")
def to_chat(
    source: Path,
    target: Path,
    user: str,
    assistant: str | None,
    remove: tuple[str, ...],
    sample: int | None,
    seed: int,
) -> None:
    """Turn the JSON lines of SOURCE into chat rows {"messages": [...]} in TARGET."""
    from axolotl_skd.chat_rows import ConversionError, convert_file

    try:
        count = convert_file(source, target, user, assistant, remove, sample, seed)
    except ConversionError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{count} rows written to {target}")


@skd.command("eval")
@click.argument("target", metavar="CONFIG_OR_MODEL")
@click.option("--tasks", help="Bundled tasks, comma-separated; needed for a model.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many documents.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Documents generated at a time.")
@click.option("--apply-chat-template/--no-apply-chat-template", default=None)
@click.option("--backend", type=click.Choice(["hf", "vllm"]), help="What generates; default hf.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default the first accelerator, if any.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Results as JSON.")
@click.option(
    "--log-samples",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for every question, answer and verdict (lm-eval's samples_*.jsonl).",
)
@click.option("--start", is_flag=True, help="Config: the untrained base model instead.")
@click.option("--output-dir", help="Config: in place of its output_dir.")
@click.option("--trust-remote-code", is_flag=True, help="Model: run code that comes with it.")
def evaluate(
    target: str,
    tasks: str | None,
    limit: int | None,
    batch_size: int | None,
    apply_chat_template: bool | None,
    backend: str | None,
    device: str | None,
    output: Path | None,
    log_samples: Path | None,
    start: bool,
    output_dir: str | None,
    trust_remote_code: bool,
) -> None:
    """Evaluate with the bundled tasks: what a CONFIG trained, or any model.

    A YAML: what is saved in its output_dir (an adapter on its base model), with the settings of
    distillation.eval where no option says otherwise; recorded in eval_results.json. A folder or hub
    id: that model; a PEFT adapter on its base model.
    """
    from axolotl_skd.evaluate_command import evaluate_config, evaluate_model, is_config
    from axolotl_skd.evaluation.needs import MissingForEvaluationError
    from axolotl_skd.evaluation.runner import EvaluationError

    given = {
        "tasks": tasks and [name.strip() for name in tasks.split(",")],
        "limit": limit,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "backend": backend,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    common = {"device": device, "output": output, "log_samples": log_samples}
    config = is_config(target)
    _refuse({"--trust-remote-code": trust_remote_code} if config else {}, "a model", target)
    _refuse({} if config else {"--start": start, "--output-dir": output_dir}, "a config", target)
    try:
        if config:
            table = evaluate_config(
                Path(target), overrides, start=start, output_dir=output_dir, **common
            )
        else:
            table = evaluate_model(target, overrides, trust_remote_code=trust_remote_code, **common)
    except (ValueError, MissingForEvaluationError, EvaluationError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(table)


def _refuse(options: dict[str, object], needs: str, target: str) -> None:
    for name, value in options.items():
        if value:
            raise click.UsageError(f"{name} is for {needs}, and {target} is none.")


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@skd.command()
@click.argument("hypotheses", type=_FILE)
@click.argument("others", type=_FILE, nargs=-1, required=True, metavar="REFERENCES... [SOURCES]")
@click.option("--metric", type=click.Choice(METRICS), required=True)
@click.option("--json", "as_json_line", is_flag=True, help="One line of JSON instead of a table.")
@click.option("--checkpoint", help="COMET: folder with hparams.yaml and checkpoints/model.ckpt.")
@click.option("--encoder", help="COMET: folder with the encoder's config.json and tokenizer.json.")
@click.option("--python", help="COMET: a Python that has unbabel-comet, to score with it.")
@click.option("--batch-size", type=click.IntRange(min=1), help="COMET: translations at a time.")
@click.option("--device", help="COMET: cpu, cuda, cuda:1, ...; default the first GPU, if any.")
def score(
    hypotheses: Path,
    others: tuple[Path, ...],
    metric: str,
    as_json_line: bool,
    **comet_options: str | int | None,
) -> None:
    """Score the lines of HYPOTHESES, one text a line, all scores times 100.

    rouge and chrf take one or more files of references; comet takes the references, then the
    sources.
    """
    from axolotl_skd.evaluation.comet import CometUnavailableError
    from axolotl_skd.evaluation.score_files import as_json, as_text, score_files

    given = {name: value for name, value in comet_options.items() if value is not None}
    try:
        scores = score_files(metric, hypotheses, others, **given)
    except (ValueError, ImportError, CometUnavailableError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(as_json(scores) if as_json_line else as_text(scores))


_DEFAULTS = ReportOptions()


@skd.command()
@click.argument("config", type=_FILE)
@click.option("--prompts", type=_FILE, help="Chat rows (.jsonl), or text, one prompt a line.")
@click.option("--task", help="Bundled task whose questions are the prompts.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=_DEFAULTS.limit,
    show_default=True,
    help="Prompts.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Default the config's.")
@click.option("--num-draft-tokens", type=click.IntRange(min=1), help="Default the config's, or 5.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=_DEFAULTS.temperature,
    show_default=True,
    help="Of the sampled run.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=_DEFAULTS.top_p,
    show_default=True,
    help="Of the sampled run.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=_DEFAULTS.repeats,
    show_default=True,
    help="Timed passes over the prompts.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the samples; default the config's.")
@click.option("--json", "as_json_line", is_flag=True, help="One line of JSON instead of a table.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Also JSON there.")
def speedup(config: Path, as_json_line: bool, output: Path | None, **options: Any) -> None:
    """Speculative decoding of CONFIG's teacher with its student as the draft.

    Before and after distillation, greedy and sampled: acceptance, tokens per teacher call, and speed
    against the teacher alone, with transformers' assisted generation. Without --prompts or --task
    the prompts are those of the config's validation rows, or else of its training rows.
    """
    import json

    from axolotl_skd.data_checks import DataError
    from axolotl_skd.draft_report.command import draft_report
    from axolotl_skd.draft_report.errors import DraftReportError
    from axolotl_skd.preflight import ConfigConflictError
    from axolotl_skd.rollout.lm import UnsupportedModelError
    from axolotl_skd.teacher import TeacherError
    from axolotl_skd.vocabulary import VocabularyError

    refusals = (
        DraftReportError,
        ConfigConflictError,
        DataError,
        TeacherError,
        UnsupportedModelError,
        VocabularyError,
    )
    try:
        report = draft_report(config, ReportOptions(**options))
    except refusals as error:
        raise click.ClickException(str(error)) from error
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(report.as_json()) if as_json_line else report.as_text())
