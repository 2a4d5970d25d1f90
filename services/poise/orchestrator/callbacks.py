"""Callbacks of a run, its clock, and the timer of a step's phases."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol


class Callbacks(Protocol):
    """Methods that a run calls as it progresses."""

    def on_phase(self, step: int, name: str) -> None:
        """A phase of a step has begun."""
        ...

    def on_sampled(self, step: int, done: int, total: int) -> None:
        """`done` of the step's `total` prompts have all their rollouts."""
        ...

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        """A step is finished; `metrics` is its line of metrics.jsonl."""
        ...

    def on_evaluation_end(self, line: dict[str, Any]) -> None:
        """An evaluation is finished; `line` is its line of evaluations.jsonl."""
        ...


class RunClock:
    """Training time of a run, summed over all its processes."""

    def __init__(self, elapsed_s: float = 0.0) -> None:
        """Continue from the seconds of earlier processes."""
        self._elapsed_s = elapsed_s
        self._started_s = time.monotonic()

    def now_s(self) -> float:
        """Return the seconds so far."""
        return self._elapsed_s + max(0.0, time.monotonic() - self._started_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        self._elapsed_s, self._started_s = self.now_s(), math.inf
        try:
            yield
        finally:
            self._started_s = time.monotonic()


class PhaseTimer:
    """Times the phases of a step and reports them to the callbacks."""

    def __init__(self, callbacks: Callbacks, step: int) -> None:
        self._callbacks = callbacks
        self._step = step
        self.seconds: dict[str, float] = {}
        """Duration of each phase."""

    def on_sampled(self, done: int, total: int) -> None:
        """See `Callbacks`."""
        self._callbacks.on_sampled(self._step, done, total)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as one phase. Blocks of the same name add up."""
        self._callbacks.on_phase(self._step, name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
