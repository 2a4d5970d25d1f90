"""`python -m poise.learner`: run the learner service."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until told to stop."""
    from poise.learner.app import build
    from poise.learner.config import LearnerConfig
    from poise.runtime.main import service_main

    return service_main("learner", LearnerConfig, build, argv)


if __name__ == "__main__":
    sys.exit(main())
