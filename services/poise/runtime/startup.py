"""The present stage of a service's start and its duration: `loading weights, 40 s`."""

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
        """Begin with `stage`."""
        self._ask: Callable[[], str] = str
        self._now = (stage, time.monotonic())

    def begin(self, stage: str) -> None:
        """Enter a stage, in words that follow "it is": `loading weights`."""
        self._now = (stage, time.monotonic())

    @contextlib.contextmanager
    def asking(self, ask: Callable[[], str]) -> Iterator[None]:
        """Take the stages of the block from what `ask` returns, where that is not empty: another process does it."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = str

    @property
    def stage(self) -> str:
        """The present stage."""
        if (stage := self._ask()) and stage != self._now[0]:
            self.begin(stage)
        return self._now[0]

    @property
    def elapsed_s(self) -> float:
        """Seconds in this stage."""
        return time.monotonic() - self._now[1]

    def __str__(self) -> str:
        return with_elapsed(self.stage, self.elapsed_s)

    def error(self, before: str = "") -> Starting:
        """Return what to raise for a call that comes too early; its message is the progress, after `before`."""
        return Starting(f"{before}{self}", retry_after_s=1.0)


def with_elapsed(stage: str, elapsed_s: float) -> str:
    """Return a stage with its seconds, as people see it."""
    return f"{stage}, {elapsed_s:.0f} s"


def without_elapsed(text: str) -> str:
    """Return a text without the seconds of its stages, to compare it with an earlier one."""
    return _ELAPSED.sub("", text)
