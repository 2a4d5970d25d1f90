"""Waiting for services: aloud, for as long as it takes, and no longer than asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from poise.runtime.startup import without_elapsed
from poise_client.errors import DeadlineExceededError, PoiseClientError

logger = logging.getLogger(__name__)

_RETRY_EVERY_S = 1.0
_SAY_EVERY_S = 15.0
_SAY_PROGRESS_EVERY_S = 60.0


class StoppedWaiting(Exception):
    """Stopping was asked for while a service was out of reach."""


def may_pass(error: PoiseClientError) -> bool:
    """Whether the same call may succeed later: also after a service hung, as on a busy machine it may."""
    return error.retryable or isinstance(error, DeadlineExceededError)


async def pause(stopping: asyncio.Event, least_s: float = 0.0) -> None:
    """Sleep until it is time to try again: not long, and a stop that comes meanwhile ends it."""
    duration_s = max(_RETRY_EVERY_S, least_s)
    if stopping.is_set():
        await asyncio.sleep(duration_s)
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), duration_s)


_START_SERVICES = "; `poise up` starts the services, `poise status` shows them"


class Waiting:
    """Waiting for one service, or the disk: says so at once and now and then, and when it is over."""

    def __init__(self, name: str, stopping: asyncio.Event, remedy: str = _START_SERVICES) -> None:
        """`remedy` ends the first message."""
        self._name = name
        self._stopping = stopping
        self._remedy = remedy
        self._since_s: float | None = None
        self._said_s: float | None = None
        self._stage = ""
        """Of a service that starts, as it was told last."""

    def say(self, why: str, patience_s: float = 0.0, *, starting: bool = False) -> None:
        """Tell what is waited for and why, unless that was lately; `patience_s` is how long to wait before a word.

        What is `starting` is no trouble: each of its stages is told once, and the same one again now and then.
        """
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        stage = without_elapsed(why) if starting else ""
        is_first = self._said_s is None
        is_new = is_first or stage != self._stage
        every_s = _SAY_PROGRESS_EVERY_S if starting else _SAY_EVERY_S
        if not is_new and now_s - (self._said_s or 0.0) < every_s:
            return
        if starting:
            logger.info("waiting for %s", why)
        elif now_s - self._since_s >= patience_s:
            logger.warning("waiting for %s%s", why, self._remedy if is_first else "")
        else:
            return
        self._stage, self._said_s = stage, now_s

    async def pause(self, error: PoiseClientError) -> None:
        """Wait until the next attempt is due.

        Raises:
            StoppedWaiting: stopping was asked for.
        """
        self.say(f"{self._name}: {error.message}", starting=error.starting)
        if not self._stopping.is_set():
            await pause(self._stopping, error.retry_after_s or 0.0)
        if self._stopping.is_set():
            raise StoppedWaiting(self._name)

    def over(self, what: str = "answers") -> None:
        """Tell that what was waited for is there, if the waiting was told."""
        if self._said_s is not None and self._since_s is not None:
            logger.info("%s %s after %.0f s", self._name, what, time.monotonic() - self._since_s)
        self._since_s = self._said_s = None
        self._stage = ""
