"""The commands of `poise`. Each imports heavy modules only when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import poise
from poise.cli.models import models
from poise.cli.options import checked, fail, load_options, log_to_terminal, run_options
from poise.cli.queue import queue
from poise.cli.verify import verify
from poise.runtime.cli.broken_pipe import exit_on_broken_pipe

if TYPE_CHECKING:
    from poise.local.run_file import LocalRun

PROGRAMS = ("generation", "value", "learner", "train")


class _Poise(click.Group):
    """Exits without an error when the reader of its output has exited, as other tools do."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the arguments, or print `--help`."""
        with exit_on_broken_pipe():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with exit_on_broken_pipe():
            return super().invoke(ctx)


@click.group(cls=_Poise, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(poise.__version__, prog_name="poise")
def main() -> None:
    """Train language models by reinforcement learning with POISE: generation, a value probe and a learner as services.

    \b
    Try it:
      poise run --preset tiny
    Train your own model or data:
      poise config --show-defaults > run.yaml      then edit it
      poise run -c run.yaml
    Compare algorithms:
      poise compare --show-defaults > compare.yaml
      poise compare -c compare.yaml
    Keep the services running, and train in another terminal:
      poise up -c run.yaml
      poise train -c run.yaml

    A run that was stopped or killed resumes with the same command.
    """


@main.command()
@run_options
def run(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Start the services, train, evaluate and report.

    The services run on this machine and stop at the end. Ctrl-C stops after the current step; the same command resumes.

    \b
    poise run --preset tiny
    poise run -c run.yaml --set train.num_steps=20 --set run.name=short
    """
    from poise.orchestrator.job import early_exit_status

    status = early_exit_status(load_options(path, preset, overrides).train)
    sys.exit(_run_services(path, preset, overrides, train=True) if status is None else status)


@main.command()
@run_options
def up(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Start the services and keep them running.

    Services that die are restarted. Ctrl-C drains and stops them.

    \b
    poise up -c run.yaml
    poise train -c run.yaml                     in another terminal
    poise status -c run.yaml
    """
    sys.exit(_run_services(path, preset, overrides, train=False))


@main.command()
@run_options
def train(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Train with running services.

    It uses the services of `poise up`, or those in train.endpoints.

    \b
    poise train -c run.yaml
    poise train -c run.yaml --set train.endpoints.learner=gpu-1:50053
    """
    from poise.orchestrator.job import train as train_job
    from poise.runtime.files.atomic import restrict_umask

    restrict_umask()
    sys.exit(train_job(load_options(path, preset, overrides).train))


@main.command(name="eval")
@run_options
@click.option("--model", metavar="MODEL", help="A Hugging Face folder, a name of `poise models`, or a name on the hub.")
@click.option(
    "--checkpoint",
    is_flag=False,
    flag_value="latest",
    metavar="[FOLDER]",
    help="A checkpoint folder; without FOLDER, the run's newest. Works during training.",
)
@click.option("--prompts", type=click.IntRange(1), help="Held-out prompts. Default: train.evaluation.num_prompts.")
@click.option(
    "--rollouts",
    type=click.IntRange(1, 256),
    help="Responses per prompt. Default: train.evaluation.rollouts_per_prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    help="Sampling temperature; 0 is greedy. Default: train.evaluation.temperature.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for evaluation.json and all responses."
)
@click.option("--json", "as_json", is_flag=True, help="Print evaluation.json instead of a table.")
def evaluate(
    path: Path | None,
    preset: str | None,
    overrides: tuple[str, ...],
    prompts: int | None,
    rollouts: int | None,
    temperature: float | None,
    **what: Any,
) -> None:
    """Evaluate a policy on the run's held-out prompts.

    Prints avg@n and pass@k with intervals, overall, by task and by domain.

    \b
    poise eval -c run.yaml                      the policy that the running services serve
    poise eval -c run.yaml --checkpoint         the learner's newest checkpoint
    poise eval -c run.yaml --model runs/a/model any model
    poise eval -c run.yaml --model tiny --rollouts 16 --temperature 0.6

    --checkpoint and --model start their own engine. The result and all responses are written to
    <run folder>/evaluations/ or --out, and never used for training.
    """
    from poise.local.evaluation import evaluate_run

    options = {"num_prompts": prompts, "rollouts_per_prompt": rollouts, "temperature": temperature}
    own = [f"train.evaluation.{name}={value}" for name, value in options.items() if value is not None]
    run = load_options(path, preset, (*overrides, *own))
    sys.exit(checked(lambda: evaluate_run(run, **what)))


@main.command()
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print all facts as JSON.")
def status(path: Path | None, preset: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the services and the progress of a run.

    Exit status: 1 if a service is not ready.
    """
    from poise.local.status import show_status

    local_run = load_options(path, preset, overrides)
    sys.exit(checked(lambda: show_status(local_run, as_json)))


@main.command()
@run_options
def check(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Check that the services work together.

    It samples, requests values and compares weights. It publishes no labels and does not train.

    It waits for services that are starting. `poise status` only shows what they report.
    """
    from poise.orchestrator.check import CheckConfig, run_check

    run = load_options(path, preset, overrides)
    sys.exit(run_check(CheckConfig(endpoints=run.train.endpoints)))


def _part(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, int]:
    """Read I/N."""
    index, slash, num_parts = text.partition("/")
    if slash and index.isdecimal() and num_parts.isdecimal() and 1 <= int(index) <= int(num_parts):
        return int(index), int(num_parts)
    raise click.BadParameter(f"{text!r} is not I/N with 1 <= I <= N, such as 1/2")


@main.command()
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Settings of the comparison, a compare.yaml.",
)
@click.option("--report-only", is_flag=True, help="Only write the report of the runs so far.")
@click.option(
    "--part",
    default="1/1",
    callback=_part,
    help="Train only part I/N of the runs, such as 1/2. Start all N parts at once to train N runs at a time.",
)
@click.option(
    "--show-defaults", is_flag=True, help="Print a compare.yaml to start from, with the meaning of each setting."
)
def compare(path: Path | None, report_only: bool, part: tuple[int, int], show_defaults: bool) -> None:
    """Compare algorithms and seeds under one budget.

    The runs train one after another, unless several processes share them; a common report compares them.

    Ctrl-C stops after the current step; the same command resumes. Exit status: 1 if a run failed.

    \b
    poise compare --show-defaults > compare.yaml
    poise compare -c compare.yaml
    poise compare -c compare.yaml --report-only
    """
    from poise.local.comparison.file import example_text
    from poise.local.comparison.runner import compare_runs

    if show_defaults:
        click.echo(example_text())
        return
    if path is None:
        fail("set -c FILE; `poise compare --show-defaults` prints a file to start from")
    log_to_terminal()
    sys.exit(checked(lambda: compare_runs(path, report_only=report_only, part=part)))


@main.command()
@run_options
@click.option("--all", "everything", is_flag=True, help="Print every setting of every program with its value.")
@click.option("--show-defaults", is_flag=True, help="Print every setting with its meaning and its default.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of run.yaml, for editors.")
@click.argument("program", required=False, type=click.Choice(PROGRAMS))
def config(
    path: Path | None,
    preset: str | None,
    overrides: tuple[str, ...],
    everything: bool,
    show_defaults: bool,
    schema: bool,
    program: str | None,
) -> None:
    """Print the settings of a run.

    By default, it prints the twenty most important ones with their values. Secrets are masked.

    PROGRAM limits the output to all settings of one program.

    \b
    poise config -c run.yaml                       the key settings, with their values
    poise config -c run.yaml --all                 every setting of every program, with its value
    poise config -c run.yaml learner               every setting of the learner, with its value
    poise config --show-defaults > run.yaml        a file to start from
    poise config --schema > run.schema.json        completion and checks for editors
    """
    from poise.local.show_config import defaults_text, key_settings_text, resolved_text, schema_text

    if schema:
        click.echo(schema_text())
    elif show_defaults:
        click.echo(defaults_text(program))
    else:
        local_run = load_options(path, preset, overrides)
        click.echo(resolved_text(local_run, program) if everything or program else key_settings_text(local_run))


def _run_services(path: Path | None, preset: str | None, overrides: tuple[str, ...], *, train: bool) -> int:
    def load() -> LocalRun:
        return load_options(path, preset, overrides)

    def work() -> int:
        from poise.local.up import run_services

        return run_services(load(), load, train=train)

    return checked(work)


main.add_command(models)
main.add_command(queue)
main.add_command(verify)
