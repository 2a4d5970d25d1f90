"""Retries writes to the run folder while its disk fails, and logs the cause."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from poise.orchestrator.sampling.retry import WaitLog
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.tasks import until_done

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = "the run's folder"
_REMEDY = ". The run then resumes"


class DiskRetry:
    """Runs file operations of one run until they succeed."""

    def __init__(self, stopping: asyncio.Event | None = None, check: Callable[[], None] | None = None) -> None:
        """Create it.

        Args:
            stopping: ends the wait when set.
            check: raises the cause of a failed operation, if known; see `RunFolder.check_open`.
        """
        self._stopping = stopping or asyncio.Event()
        self._check = check

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on a thread and return its result; retry while it raises `OSError`.

        Raises:
            StopRequested: a stop was requested while the disk failed.
            RunError: the folder was deleted.
        """
        waiting = WaitLog(_NAME, self._stopping, _REMEDY)
        while True:
            try:
                result = await until_done(asyncio.to_thread(work))
            except OSError as error:
                waiting.report(f"{_NAME}: {describe_disk_error(self._cause(error))}")
                await waiting.pause()
            else:
                waiting.done("can be written again")
                return result

    def _cause(self, error: OSError) -> OSError:
        """Return the cause of a failed operation. A moved folder explains more than a missing file."""
        if self._check is not None:
            try:
                self._check()
            except OSError as cause:
                return cause
        return error
