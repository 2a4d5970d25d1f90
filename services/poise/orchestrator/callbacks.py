"""Whoever is shown how a run goes, and where the seconds of a step go."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol


class Watcher(Protocol):
    """Whoever is shown how a run goes."""

    def phase(self, step: int, name: str) -> None:
        """A phase of a step begins."""
        ...

    def sampled(self, step: int, done: int, total: int) -> None:
        """So many of the step's prompts have all their rollouts."""
        ...

    def step_done(self, numbers: dict[str, Any]) -> None:
        """A step is finished; `numbers` is its line of metrics.jsonl."""
        ...

    def evaluated(self, line: dict[str, Any]) -> None:
        """An evaluation is finished."""
        ...


class RunClock:
    """Seconds that a run has taken, over all its processes."""

    def __init__(self, spent_s: float) -> None:
        self._spent_s = spent_s
        self._started_s = time.monotonic()

    def now_s(self) -> float:
        """Return the seconds up to now."""
        return self._spent_s + max(0.0, time.monotonic() - self._started_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of the block."""
        self._spent_s, self._started_s = self.now_s(), math.inf
        try:
            yield
        finally:
            self._started_s = time.monotonic()


class Phases:
    """Seconds spent in each phase of a step."""

    def __init__(self, watcher: Watcher, step: int) -> None:
        self._watcher = watcher
        self._step = step
        self.seconds: dict[str, float] = {}

    def sampled(self, done: int, total: int) -> None:
        """Show that so many of the step's prompts have all their rollouts."""
        self._watcher.sampled(self._step, done, total)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Show and time the phase that the block is."""
        self._watcher.phase(self._step, name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
