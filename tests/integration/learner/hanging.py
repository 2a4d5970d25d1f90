"""The learner under torchrun with ranks that can be made to hang or fail; tests run it as a process.

Usage: hanging.py FOLDER [options of poise.learner]. Each rank writes its process id to FOLDER/pid-RANK. SIGUSR1 makes
its main thread hang. If FOLDER/hang-RANK exists, that rank deletes it and hangs at its next training step. While
FOLDER/fail-RANK exists, training on the step number in it raises there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from poise.learner.__main__ import main
from poise.learner.training.trainer import Trainer

FOLDER = Path(sys.argv[1])
RANK = os.environ["RANK"]


def hang(*_: object) -> None:
    while True:
        time.sleep(1)


def train_or_hang(self: Trainer, rollouts: Any, temperature: float) -> Any:
    (FOLDER / f"training-{RANK}").touch()
    if (FOLDER / f"hang-{RANK}").exists():
        (FOLDER / f"hang-{RANK}").unlink()
        hang()
    failing = FOLDER / f"fail-{RANK}"
    if failing.exists() and rollouts[0].id.step == int(failing.read_text()):
        raise MemoryError("no memory left")
    return train(self, rollouts, temperature)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, hang)
    train, Trainer.train = Trainer.train, train_or_hang  # type: ignore[method-assign]
    (FOLDER / f"pid-{RANK}").write_text(str(os.getpid()))
    sys.exit(main(sys.argv[2:]))
