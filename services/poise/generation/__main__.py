"""`python -m poise.generation`: run the generation service."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poise.runtime.cli.lean_imports import hide_unused_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service with the settings of the command line. Return the exit status."""
    hide_unused_packages()
    from poise.generation.app import build
    from poise.generation.config import GenerationConfig
    from poise.runtime.cli.service_main import service_main

    return service_main("generation", GenerationConfig, build, argv)


if __name__ == "__main__":
    sys.exit(main())
