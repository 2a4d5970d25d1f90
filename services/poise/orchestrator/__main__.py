"""`python -m poise.orchestrator`: train against running services."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Train against running services; resume the run if its folder exists."""
    from poise.orchestrator.config import OrchestratorConfig
    from poise.orchestrator.job import train
    from poise.runtime.cli.exit_status import WRONG_SETTINGS
    from poise.runtime.config.load import load_config
    from poise.runtime.config.settings import ConfigError

    parser = argparse.ArgumentParser(prog="python -m poise.orchestrator", description=main.__doc__)
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", required=True, help="settings file, YAML")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    options = parser.parse_args(argv)
    try:
        config = load_config(OrchestratorConfig, options.config, options.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG_SETTINGS
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
