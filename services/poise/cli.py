"""`poise`: the one command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

import poise

if TYPE_CHECKING:
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

    local_run = _load(path, preset, overrides)
    status = settle(local_run.train)
    sys.exit(_run_services(local_run, train=True) if status is None else status)


@main.command()
@_run_options
def up(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Start the services on this machine and stay, starting again what dies. Ctrl-C drains and stops them."""
    sys.exit(_run_services(_load(path, preset, overrides), train=False))


@main.command()
@_run_options
def train(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Train against services that are up: those of `poise up`, or wherever train.endpoints says."""
    from poise.orchestrator.job import train as train_job

    sys.exit(train_job(_load(path, preset, overrides).train))


@main.command(name="eval")
@_run_options
def evaluate(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> None:
    """Measure the policy served now on the run's held-out prompts. The services must be up."""
    from poise.orchestrator.job import evaluate as evaluate_job

    sys.exit(evaluate_job(_load(path, preset, overrides).train))


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


def _run_services(run: LocalRun, *, train: bool) -> int:
    def work() -> int:
        from poise.local.up import run_services

        return run_services(run, train=train)

    return _checked(work)


def _log_to_terminal() -> None:
    from poise.runtime.config import LoggingConfig
    from poise.runtime.logging import configure_logging

    configure_logging(LoggingConfig())


def _checked(work: Callable[[], T]) -> T:
    from poise.runtime.config import ConfigError

    try:
        return work()
    except ConfigError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error}; `make setup` installs what every command needs")


def _fail(message: str) -> NoReturn:
    click.echo(f"poise: {message}", err=True)
    sys.exit(2)
