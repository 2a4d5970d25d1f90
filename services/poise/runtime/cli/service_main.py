"""The command line of every service."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from poise.errors import Misconfigured
from poise.runtime.cli.broken_pipe import exit_on_broken_pipe
from poise.runtime.cli.exit_status import OK, WRONG_SETTINGS, exit_reason, exit_status
from poise.runtime.config.load import load_config
from poise.runtime.config.settings import ServiceConfig
from poise.runtime.config.text import defaults_yaml
from poise.runtime.files.atomic import restrict_umask
from poise.runtime.logging import configure_logging
from poise.runtime.server import serve
from poise.runtime.service import ServiceApp

C = TypeVar("C", bound=ServiceConfig)


def service_main(
    name: str,
    config_cls: type[C],
    build: Callable[[C], ServiceApp],
    argv: Sequence[str] | None = None,
    *,
    run: Callable[[C], int] | None = None,
) -> int:
    """Parse the command line, load the settings and serve, or call `run` instead; return the exit status."""
    prefix = config_cls.model_config.get("env_prefix", "")
    parser = argparse.ArgumentParser(
        prog=f"python -m poise.{name}",
        description=f"Run the POISE {name} service.",
        epilog="Order of precedence of settings: --set, the environment "
        f"({prefix}SECTION__FIELD), the file, the default.",
    )
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings file, YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        dest="overrides",
        help="set one setting; repeatable",
    )
    parser.add_argument(
        "--show-defaults", action="store_true", help="print every setting with its meaning and default, and exit"
    )
    with exit_on_broken_pipe():
        options = parser.parse_args(argv)
        if options.show_defaults:
            print(defaults_yaml(config_cls))
            return OK
    restrict_umask()
    try:
        config = load_config(config_cls, options.config, options.overrides)
        if run is not None:
            configure_logging(config.logging)
            return run(config)
        app = build(config)
    except Misconfigured as error:
        print(exit_reason(error), file=sys.stderr)
        return exit_status(error)
    except ModuleNotFoundError as error:
        print(f"{error}. Install the packages that the {name} service needs with these settings", file=sys.stderr)
        return WRONG_SETTINGS
    return serve(app)
