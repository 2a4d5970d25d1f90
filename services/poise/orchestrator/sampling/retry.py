"""Retries until a service or the disk works again: pauses, transient errors, log messages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from poise.runtime.startup import without_elapsed
from poise_client.errors import DeadlineExceededError, PoiseClientError

logger = logging.getLogger(__name__)

RETRY_EVERY_S = 1.0
_LOG_EVERY_S = 15.0
_LOG_PROGRESS_EVERY_S = 60.0


class StopRequested(Exception):
    """A stop was requested while waiting."""


def is_transient(error: PoiseClientError) -> bool:
    """Return whether the same call may succeed later. Includes timeouts, which happen on busy machines."""
    return error.retryable or isinstance(error, DeadlineExceededError)


async def pause(stopping: asyncio.Event, min_s: float = 0.0) -> None:
    """Sleep until the next retry, or until `stopping` is set. If it is already set, sleep the whole time."""
    duration_s = max(RETRY_EVERY_S, min_s)
    if stopping.is_set():
        await asyncio.sleep(duration_s)
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), duration_s)


_START_SERVICES = "; `poise up` starts the services, `poise status` shows them"


class WaitLog:
    """Logs a wait for a service or the disk: its start, its progress at intervals, and its end."""

    def __init__(self, name: str, stopping: asyncio.Event, remedy: str = _START_SERVICES) -> None:
        """Log waiting for `name`. The first message ends with `remedy`."""
        self._name = name
        self._stopping = stopping
        self._remedy = remedy
        self._since_s: float | None = None
        self._logged_s: float | None = None
        self._stage = ""
        """The start-up stage in the last message."""

    def report(self, why: str, patience_s: float = 0.0, *, starting: bool = False) -> None:
        """Log the reason for the wait, unless the last message is recent or the wait is shorter than `patience_s`.

        With `starting`, the reason is a service's start-up stage: log each stage once, then at longer intervals.
        """
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        stage = without_elapsed(why) if starting else ""
        is_first = self._logged_s is None
        is_new = is_first or stage != self._stage
        every_s = _LOG_PROGRESS_EVERY_S if starting else _LOG_EVERY_S
        if not is_new and now_s - (self._logged_s or 0.0) < every_s:
            return
        if starting:
            logger.info("waiting for %s", why)
        elif now_s - self._since_s >= patience_s:
            logger.warning("waiting for %s%s", why, self._remedy if is_first else "")
        else:
            return
        self._stage, self._logged_s = stage, now_s

    async def pause(self, min_s: float = 0.0) -> None:
        """Wait until the next retry.

        Raises:
            StopRequested: a stop was requested before or during the wait.
        """
        if not self._stopping.is_set():
            await pause(self._stopping, min_s)
        if self._stopping.is_set():
            raise StopRequested(self._name)

    def done(self, what: str = "answers") -> None:
        """Log the end of the wait, if its start was logged."""
        if self._logged_s is not None and self._since_s is not None:
            logger.info("%s %s after %.0f s", self._name, what, time.monotonic() - self._since_s)
        self._since_s = self._logged_s = None
        self._stage = ""
