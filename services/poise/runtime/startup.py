"""The current stage of a service's start and its duration: `loading weights, 40 s`."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator

from poise.errors import Starting

_ELAPSED = re.compile(r", \d+ s(?=$|;)")


class Startup:
    """The progress of one start. Its methods may be called from any thread."""

    def __init__(self, stage: str) -> None:
        """Start with `stage`."""
        self._read_stage: Callable[[], str] = str
        self._now = (stage, time.monotonic())

    def begin(self, stage: str) -> None:
        """Enter a stage, named by a participle: `loading weights`."""
        self._now = (stage, time.monotonic())

    @contextlib.contextmanager
    def reported_by(self, read_stage: Callable[[], str]) -> Iterator[None]:
        """Inside the block, use the stage that `read_stage` gets from another process, unless it is empty."""
        self._read_stage = read_stage
        try:
            yield
        finally:
            self._read_stage = str

    @property
    def stage(self) -> str:
        """The current stage."""
        if (stage := self._read_stage()) and stage != self._now[0]:
            self.begin(stage)
        return self._now[0]

    @property
    def elapsed_s(self) -> float:
        """Seconds in this stage."""
        return time.monotonic() - self._now[1]

    def __str__(self) -> str:
        return with_elapsed(self.stage, self.elapsed_s)

    def error(self, before: str = "") -> Starting:
        """Return the error for a call that came too early. Its message is `before` and the progress."""
        return Starting(f"{before}{self}", retry_after_s=1.0)


def with_elapsed(stage: str, elapsed_s: float) -> str:
    """Return a stage with its seconds: `loading weights, 40 s`."""
    return f"{stage}, {elapsed_s:.0f} s"


def without_elapsed(text: str) -> str:
    """Remove the seconds of stages from a text, to compare it with an earlier one."""
    return _ELAPSED.sub("", text)
