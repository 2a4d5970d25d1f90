"""What turning the prompts of a request into ids may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class LimitReached(Exception):
    """The work was ended; the text says why."""


class TimeLimit:
    """A deadline for several prompts together. Another thread may cancel it."""

    def __init__(self, total_s: float = 60.0, *, each_s: float = 5.0, max_chars: int = 2**24) -> None:
        """Start the clock.

        Args:
            total_s: most seconds of all prompts together.
            each_s: most seconds that a chat template may take for one conversation.
            max_chars: most characters that it may make of one.
        """
        self.each_s = each_s
        self.max_chars = max_chars
        self._total_s = total_s
        self._end_s = time.monotonic() + total_s
        self._is_cancelled = False

    def cancel(self) -> None:
        """Let `check` raise from now on. For another thread to call."""
        self._is_cancelled = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock meanwhile; it can still be cancelled."""
        started_s, end_s = time.monotonic(), self._end_s
        self._end_s = float("inf")
        try:
            yield
        finally:
            self._end_s = end_s + time.monotonic() - started_s

    def check(self) -> None:
        """Raise `LimitReached` when nothing more may run."""
        if self._is_cancelled:
            raise LimitReached("the request was cancelled")
        if time.monotonic() > self._end_s:
            raise LimitReached(f"all prompts took more than {self._total_s:g} s")
