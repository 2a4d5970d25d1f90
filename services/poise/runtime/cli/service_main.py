"""The command line that every service shares."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from poise.errors import Misconfigured
from poise.runtime.cli.broken_pipe import ending_with_reader
from poise.runtime.cli.exit_status import OK, WRONG_SETTINGS, exit_reason, exit_status
from poise.runtime.config.load import load_config
from poise.runtime.config.settings import ServiceConfig
from poise.runtime.config.text import defaults_yaml
from poise.runtime.files.atomic import keep_private
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
    """Parse the command line, load the settings, serve; or `run` something else with them.

    Returns the exit status, see `poise.runtime.cli.exit_status`.
    """
    prefix = config_cls.model_config.get("env_prefix", "")
    parser = argparse.ArgumentParser(
        prog=f"python -m poise.{name}",
        description=f"Run the POISE {name} service.",
        epilog=f"Settings: --set, then {prefix}SECTION__FIELD in the environment, then the file, then the default.",
    )
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings, YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        dest="overrides",
        help="override a setting; repeatable",
    )
    parser.add_argument("--show-defaults", action="store_true", help="print every setting with its default, and exit")
    with ending_with_reader():
        options = parser.parse_args(argv)
        if options.show_defaults:
            print(defaults_yaml(config_cls))
            return OK
    keep_private()
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
        print(f"{error}; install what the {name} service needs under these settings", file=sys.stderr)
        return WRONG_SETTINGS
    return serve(app)
