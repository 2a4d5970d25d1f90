"""A limit on the time and size of tokenizing the prompts of one request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class LimitReached(Exception):
    """The work was stopped; the text says why."""


class TimeLimit:
    """A deadline for several prompts together. Another thread can cancel it."""

    def __init__(self, total_s: float = 60.0, *, each_s: float = 5.0, max_chars: int = 2**24) -> None:
        """Start the clock.

        Args:
            total_s: maximum seconds for all prompts together.
            each_s: maximum seconds for the chat template of one conversation.
            max_chars: maximum characters that a chat template may produce.
        """
        self.each_s = each_s
        self.max_chars = max_chars
        self._total_s = total_s
        self._end_s = time.monotonic() + total_s
        self._is_cancelled = False

    def cancel(self) -> None:
        """Make `check` raise from now on. Safe to call from another thread."""
        self._is_cancelled = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the context. `cancel` still works."""
        started_s, end_s = time.monotonic(), self._end_s
        self._end_s = float("inf")
        try:
            yield
        finally:
            self._end_s = end_s + time.monotonic() - started_s

    def check(self) -> None:
        """Raise `LimitReached` after the deadline or after `cancel`."""
        if self._is_cancelled:
            raise LimitReached("the request was cancelled")
        if time.monotonic() > self._end_s:
            raise LimitReached(f"the prompts of the request took more than {self._total_s:g} s")
