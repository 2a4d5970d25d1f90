"""Writing to the run's folder: waits while its disk refuses, says why, and resumes when it can.

Knows neither the files nor what is in them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from poise.orchestrator.waiting import StoppedWaiting, Waiting, pause
from poise.runtime.files import describe_disk_error

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = "the run's folder"
_REMEDY = ". The run resumes by itself then"


class Storage:
    """The disk of one run, as the loop sees it: always there in the end."""

    def __init__(self, stopping: asyncio.Event | None = None) -> None:
        """`stopping` ends the waiting."""
        self._stopping = stopping or asyncio.Event()

    async def keep(self, work: Callable[[], T]) -> T:
        """Return what `work` does, on a thread; call it again for as long as it raises `OSError`.

        Raises:
            StoppedWaiting: stopping was asked for while the disk refused.
        """
        waiting = Waiting(_NAME, self._stopping, _REMEDY)
        while True:
            try:
                done = await to_its_end(asyncio.to_thread(work))
            except OSError as error:
                waiting.say(f"{_NAME}: {describe_disk_error(error)}")
                if not self._stopping.is_set():
                    await pause(self._stopping)
                if self._stopping.is_set():
                    raise StoppedWaiting(_NAME) from error
            else:
                waiting.over("can be written again")
                return done


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await what cannot be interrupted, also when cancelled: the folder is closed only after it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
