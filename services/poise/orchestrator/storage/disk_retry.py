"""Retries writes to the run's folder while its disk fails, and logs why.

Does not know the files or their content.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from poise.orchestrator.sampling.waiting import StoppedWaiting, Waiting, pause
from poise.runtime.files.atomic import describe_disk_error

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = "the run's folder"
_REMEDY = ". The run then resumes"


class Storage:
    """Retries failed writes of one run until they succeed."""

    def __init__(self, stopping: asyncio.Event | None = None, check: Callable[[], None] | None = None) -> None:
        """Create it.

        Args:
            stopping: ends the waiting.
            check: raises the cause of a failed write where it knows one; see `RunFolder.check_held`.
        """
        self._stopping = stopping or asyncio.Event()
        self._check = check

    async def keep(self, work: Callable[[], T]) -> T:
        """Run `work` on a thread and return its result; retry while it raises `OSError`.

        Raises:
            StoppedWaiting: a stop was requested while the disk failed.
            RunError: the folder was deleted.
        """
        waiting = Waiting(_NAME, self._stopping, _REMEDY)
        while True:
            try:
                done = await to_its_end(asyncio.to_thread(work))
            except OSError as error:
                waiting.say(f"{_NAME}: {describe_disk_error(self._cause(error))}")
                if not self._stopping.is_set():
                    await pause(self._stopping)
                if self._stopping.is_set():
                    raise StoppedWaiting(_NAME) from error
            else:
                waiting.over("can be written again")
                return done

    def _cause(self, error: OSError) -> OSError:
        """Return why a write failed: a folder that was moved explains more than a missing file."""
        if self._check is not None:
            try:
                self._check()
            except OSError as cause:
                return cause
        return error


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await what cannot be interrupted, also when cancelled: the folder is closed only after it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
