"""`python -m poise.value`: run the value service."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until stopped."""
    from poise.runtime.cli.service_main import service_main
    from poise.value.app import build
    from poise.value.config import ValueConfig

    return service_main("value", ValueConfig, build, argv)


if __name__ == "__main__":
    sys.exit(main())
