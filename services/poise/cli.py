"""`poise`: the one command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

import poise

if TYPE_CHECKING:
    from poise.local.queue import QueueAdmin
    from poise.local.run_file import LocalRun

T = TypeVar("T")

PROGRAMS = ("generation", "value", "learner", "train")

_config_option = click.option(
    "-c", "--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="The run's file, run.yaml."
)
_preset_option = click.option("--preset", help="A ready-made run: tiny (3 minutes, no vLLM) or smollm2 (15 minutes).")
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a setting, such as train.num_steps=20."
)


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return _config_option(_preset_option(_set_option(command)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(poise.__version__, prog_name="poise")
def main() -> None:
    """Train language models by reinforcement learning with POISE: rollouts, a value probe and a learner as services.

    \b
    Try it:              poise run --preset tiny
    Start your own:      poise config --show-defaults > run.yaml, keep what you change, poise run -c run.yaml
    Compare algorithms:  poise compare --show-defaults > compare.yaml, poise compare -c compare.yaml
    Services alone:      poise up -c run.yaml, and in another terminal poise train -c run.yaml

    The same command resumes a run that was stopped or killed.
    """


@main.command()
@_run_options
def run(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Start the services on this machine, train, evaluate, report, and stop them.

    Ctrl-C stops after the step in hand; the same command resumes.
    """
    from poise.orchestrator.job import settle

    status = settle(_load(path, preset, overrides).train)
    sys.exit(_run_services(path, preset, overrides, train=True) if status is None else status)


@main.command()
@_run_options
def up(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Start the services on this machine and stay, starting again what dies. Ctrl-C drains and stops them."""
    sys.exit(_run_services(path, preset, overrides, train=False))


@main.command()
@_run_options
def train(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Train against services that are up: those of `poise up`, or wherever train.endpoints says."""
    from poise.orchestrator.job import train as train_job

    sys.exit(train_job(_load(path, preset, overrides).train))


@main.command(name="eval")
@_run_options
@click.option("--model", metavar="MODEL", help="A Hugging Face folder, a name of `poise models`, or one on the hub.")
@click.option(
    "--checkpoint",
    is_flag=False,
    flag_value="latest",
    metavar="[FOLDER]",
    help="A checkpoint of the learner; without FOLDER the run's newest, also while it trains.",
)
@click.option("--prompts", type=click.IntRange(1), help="Held-out prompts; else train.evaluation.num_prompts.")
@click.option("--rollouts", type=click.IntRange(1, 256), help="Responses to each; else rollouts_per_prompt there.")
@click.option("--temperature", type=click.FloatRange(0, 100), help="Of sampling, 0 is greedy; else temperature there.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for evaluation.json, all responses."
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
    """Measure on the run's held-out prompts: avg@n and pass@k with intervals, overall, by task and by domain.

    \b
    poise eval -c run.yaml                      what the services serve now; they must be up
    poise eval -c run.yaml --checkpoint         the learner's newest checkpoint
    poise eval -c run.yaml --model runs/a/model any model; both of these start an engine for themselves
    poise eval -c run.yaml --model tiny --rollouts 16 --temperature 0.6

    Nothing of it is trained on. All responses are kept in <run folder>/evaluations/, or --out.
    """
    from poise.local.evaluation import evaluate_run

    given = {"num_prompts": prompts, "rollouts_per_prompt": rollouts, "temperature": temperature}
    own = [f"train.evaluation.{name}={value}" for name, value in given.items() if value is not None]
    run = _load(path, preset, (*overrides, *own))
    sys.exit(_checked(lambda: evaluate_run(run, **what)))


@main.command()
@_run_options
@click.option("--json", "as_json", is_flag=True, help="Everything the services tell, as JSON.")
def status(path: Path | None, preset: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what each service of the run does, and how far the run is. Status 1 when one is not ready."""
    from poise.local.status import show_status

    local_run = _load(path, preset, overrides)
    sys.exit(_checked(lambda: show_status(local_run, as_json)))


@main.command()
@_run_options
def check(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Do the services work, and with each other? Samples, values, compares weights; leaves no trace.

    It waits for services that are starting. `poise status` only shows what they say of themselves.
    """
    from poise.orchestrator.check import CheckConfig, run_check

    run = _load(path, preset, overrides)
    sys.exit(run_check(CheckConfig(endpoints=run.train.endpoints)))


@main.command()
@click.option("-c", "--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="The comparison's file.")
@click.option("--report-only", is_flag=True, help="Report on what there is, and run nothing.")
@click.option("--show-defaults", is_flag=True, help="Print a compare.yaml to start from, with what each setting means.")
def compare(path: Path | None, report_only: bool, show_defaults: bool) -> None:
    """Train with several algorithms and seeds under one budget, one run after another, and report on them together.

    Ctrl-C stops after the step in hand; the same command resumes. Status 1 when a run failed.
    """
    from poise.local.comparison.file import example_text
    from poise.local.comparison.runner import compare_runs

    if show_defaults:
        click.echo(example_text())
        return
    if path is None:
        _fail("give -c FILE; `poise compare --show-defaults` prints one to start from")
    _log_to_terminal()
    sys.exit(_checked(lambda: compare_runs(path, report_only=report_only)))


@main.group()
def queue() -> None:
    """The labels on their way to the probe: how many wait, and which were refused as poison.

    \b
    poise queue status -c run.yaml              how many wait
    poise queue list -c run.yaml                what was refused, and why
    poise queue replay -c run.yaml ID...        queue it again, once the reason is gone; --all for all
    poise queue discard -c run.yaml ID...       delete it for good

    Instead of a run, --admin http://host:8052 names the admin app of a value service, and --token-file its token.
    """


def _queue_options(command: Callable[..., Any]) -> Callable[..., Any]:
    admin = click.option("--admin", metavar="URL", help="Admin app of a value service, in place of a run.")
    token = click.option(
        "--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File with its bearer token."
    )
    return _run_options(admin(token(command)))


_letters_argument = click.argument("ids", nargs=-1)
_all_option = click.option("--all", "everything", is_flag=True, help="All that are kept, oldest first.")


@queue.command(name="status")
@_queue_options
def queue_status(**where: Any) -> None:
    """Tell how many labels wait, and how many were ever refused."""
    pending, dead = _checked(_queue_admin(**where).depth)
    click.echo(f"{pending} groups published and not yet learnt; {dead} ever refused")


@queue.command(name="list")
@_queue_options
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most letters shown.")
def queue_list(limit: int, **where: Any) -> None:
    """List what was refused, newest first: id, group, size, reason."""
    from poise.local.queue import letter_line

    letters = _checked(lambda: _queue_admin(**where).letters(limit))
    click.echo("\n".join(map(letter_line, letters)) or "nothing was refused")


@queue.command(name="replay")
@_queue_options
@_letters_argument
@_all_option
def queue_replay(ids: tuple[str, ...], everything: bool, **where: Any) -> None:
    """Queue refused labels again as they were: all of the named ones, or none.

    A label that was learnt meanwhile is not learnt twice; one that is still poison is refused again.
    """
    admin = _queue_admin(**where)
    wanted = _checked(lambda: _wanted_letters(admin, ids, everything))
    click.echo(f"{_checked(lambda: admin.replay(wanted)) if wanted else 0} queued again")


@queue.command(name="discard")
@_queue_options
@_letters_argument
@_all_option
def queue_discard(ids: tuple[str, ...], everything: bool, **where: Any) -> None:
    """Delete refused labels for good."""
    admin = _queue_admin(**where)
    wanted = _checked(lambda: _wanted_letters(admin, ids, everything))
    click.echo(f"{_checked(lambda: admin.discard(wanted)) if wanted else 0} deleted")


def _wanted_letters(admin: QueueAdmin, ids: tuple[str, ...], everything: bool) -> list[str]:
    if bool(ids) == everything:
        _fail("name the ids of `poise queue list`, or give --all")
    return admin.all_ids() if everything else list(ids)


def _queue_admin(
    path: Path | None,
    preset: str | None,
    overrides: tuple[str, ...],
    admin: str | None,
    token_file: Path | None,
) -> QueueAdmin:
    from poise.local.queue import QueueAdmin
    from poise.runtime.config import read_token_file

    if admin is None:
        run = _load(path, preset, overrides)
        return QueueAdmin(f"http://{run.admin_address('value')}", _checked(run.value.auth.read_token))
    token = None if token_file is None else _checked(lambda: read_token_file(token_file, "--token-file"))
    return QueueAdmin(admin.rstrip("/"), token)


@main.command()
@_run_options
@click.option("--show-defaults", is_flag=True, help="Print every setting with its default and what it means.")
@click.argument("program", required=False, type=click.Choice(PROGRAMS))
def config(
    path: Path | None, preset: str | None, overrides: tuple[str, ...], show_defaults: bool, program: str | None
) -> None:
    """Show a run's settings as each program will see them, secrets masked; or all defaults."""
    from poise.local.settings import defaults_text, resolved_text

    if show_defaults:
        click.echo(defaults_text(program))
    else:
        click.echo(resolved_text(_load(path, preset, overrides), program))


@main.command()
@click.argument("name", required=False)
def models(name: str | None) -> None:
    """List the models that can be made here, or make one in the cache."""
    from poise.local.models import KNOWN_MODELS, cache_dir, is_ready, make_model

    if name is not None:
        if name not in KNOWN_MODELS:
            _fail(f"model {name!r} is unknown; there are: {', '.join(KNOWN_MODELS)}")
        _log_to_terminal()
        click.echo(_checked(lambda: make_model(name)))
        return
    for known, about in KNOWN_MODELS.items():
        state = "ready" if is_ready(known) else f"takes about {about.seconds} s"
        click.echo(f"{known:24} {about.about} ({state})")
    click.echo(f"cache: {cache_dir()}")


def _load(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> LocalRun:
    """Read the run that the options name."""
    from poise.local.run_file import load_run, preset_path

    if (path is None) == (preset is None):
        _fail("give either -c FILE or --preset NAME; `poise config --show-defaults` prints a file to start from")
    _log_to_terminal()
    return _checked(lambda: load_run(path or preset_path(str(preset)), overrides))


def _run_services(path: Path | None, preset: str | None, overrides: tuple[str, ...], *, train: bool) -> int:
    def load() -> LocalRun:
        return _load(path, preset, overrides)

    def work() -> int:
        from poise.local.up import run_services

        return run_services(load(), load, train=train)

    return _checked(work)


def _log_to_terminal() -> None:
    from poise.runtime.config import LoggingConfig
    from poise.runtime.logging import configure_logging

    configure_logging(LoggingConfig())


def _checked(work: Callable[[], T]) -> T:
    from poise.local.queue import QueueError
    from poise.runtime.config import ConfigError

    try:
        return work()
    except (ConfigError, QueueError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error}; `make setup` installs what every command needs")


def _fail(message: str) -> NoReturn:
    click.echo(f"poise: {message}", err=True)
    sys.exit(2)
