"""What all commands share: the options that name a run, and how mistakes are told."""

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
    "-c", "--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="The run's file, run.yaml."
)
_preset_option = click.option("--preset", help="A ready-made run: tiny (3 minutes, no vLLM) or smollm2 (15 minutes).")
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a setting, such as train.num_steps=20."
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that name a run."""
    return _config_option(_preset_option(_set_option(command)))


def load_options(path: Path | None, preset: str | None, overrides: tuple[str, ...]) -> LocalRun:
    """Read the run that the options name."""
    from poise.local.run_file import load_run, preset_path

    if (path is None) == (preset is None):
        fail("give either -c FILE or --preset NAME; `poise config --show-defaults` prints a file to start from")
    log_to_terminal()
    return checked(lambda: load_run(path or preset_path(str(preset)), overrides))


def log_to_terminal() -> None:
    """Let the log be seen."""
    from poise.runtime.config.settings import LoggingConfig
    from poise.runtime.logging import configure_logging

    configure_logging(LoggingConfig())


def checked(work: Callable[[], T]) -> T:
    """Return what `work` does; end with its message where it raises what a user can mend."""
    from poise.local.queue import QueueError
    from poise.runtime.config.settings import ConfigError

    try:
        return work()
    except ConfigError as error:
        fail(str(error))
    except QueueError as error:
        fail(str(error), FAILED)
    except ModuleNotFoundError as error:
        fail(f"{error}; `make setup` installs what every command needs")


def fail(message: str, status: int = WRONG_SETTINGS) -> NoReturn:
    """Print what is wrong, and exit with `status`."""
    click.echo(f"poise: {message}", err=True)
    sys.exit(status)
