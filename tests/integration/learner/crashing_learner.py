"""A learner that kills itself at a point of its second batch; tests run it as a process.

Usage: crashing_learner.py POINT [options of poise.learner]. With POINT "nowhere" it survives.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from poise.learner import app
from poise.learner.config import LearnerConfig
from poise.learner.storage import checkpoint
from poise.learner.training.trainer import Trainer
from poise.runtime.cli.service_main import service_main


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def die_after(owner: Any, name: str, num_calls: int) -> None:
    """Let a function return `num_calls` times, then die."""
    work, calls = getattr(owner, name), []

    def counted(*args: Any, **named: Any) -> Any:
        answer = work(*args, **named)
        calls.append(1)
        if len(calls) == num_calls:
            die()
        return answer

    setattr(owner, name, counted)


POINTS = {
    "nowhere": lambda: None,
    "between two updates of a batch": lambda: die_after(Trainer, "update", 3),
    "trained on, not yet answered": lambda: die_after(Trainer, "train", 2),
    "answered, the checkpoint half written": lambda: die_after(checkpoint, "_sha256", 1),
}

if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    sys.exit(service_main("learner", LearnerConfig, app.build, sys.argv[2:]))
