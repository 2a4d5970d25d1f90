"""`python -m poise.learner`: run the learner service."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poise.runtime.cli.lean_imports import hide_unused_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Under torchrun, rank 0 serves and the other ranks follow its commands."""
    hide_unused_packages()
    from poise.learner.app import build
    from poise.learner.config import LearnerConfig
    from poise.learner.distributed.process_group import rank
    from poise.runtime.cli.service_main import service_main

    if rank() > 0:
        from poise.learner.distributed.coordinator import follow

        return service_main("learner", LearnerConfig, build, argv, run=follow)
    return service_main("learner", LearnerConfig, build, argv)


if __name__ == "__main__":
    sys.exit(main())
