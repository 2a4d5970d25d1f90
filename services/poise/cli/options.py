"""Shared by the commands: the options that select a run, and error messages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from poise.runtime.cli.exit_status import FAILED, WRONG_SETTINGS

if TYPE_CHECKING:
    from poise.local.run_file import LocalRun

T = TypeVar("T")

_config_option = click.option(
    "-c", "--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="Settings of the run, a run.yaml."
)
_preset_option = click.option(
    "--preset", help="A built-in run instead of -c: tiny (1 to 3 minutes, no vLLM) or smollm2 (6 to 12 minutes)."
)
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=VALUE",
    help="Set one setting, such as train.num_steps=20. Repeatable.",
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that select a run to a command."""
    return _config_option(_preset_option(_set_option(command)))


def load_options(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> LocalRun:
    """Load the run that the options select."""
    from poise.local.run_file import load_run, preset_path

    if (path is None) == (preset is None):
        fail("set either -c FILE or --preset NAME; `poise config --show-defaults` prints a file to start from")
    log_to_terminal()
    return checked(lambda: load_run(path or preset_path(str(preset)), overrides))


def log_to_terminal() -> None:
    """Log to standard error."""
    from poise.runtime.config.settings import LoggingConfig
    from poise.runtime.logging import configure_logging

    configure_logging(LoggingConfig())


def checked(work: Callable[[], T]) -> T:
    """Call `work` and return its result. Exit with the message of an error that the user can correct."""
    from poise.local.queue import QueueError
    from poise.runtime.config.settings import ConfigError

    try:
        return work()
    except ConfigError as error:
        fail(str(error))
    except QueueError as error:
        fail(str(error), FAILED)
    except ModuleNotFoundError as error:
        fail(f"{error}. `make setup` installs the packages of every command")


def fail(message: str, status: int = WRONG_SETTINGS) -> NoReturn:
    """Print an error message, and exit with `status`."""
    click.echo(f"poise: {message}", err=True)
    sys.exit(status)
