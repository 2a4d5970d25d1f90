"""Awaiting work that must end even if its caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def until_done(work: Coroutine[Any, Any, T]) -> T:
    """Await the end of `work` even if cancelled, so that a file or folder is not closed during its use."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    finally:
        await wait_until_done(task)


async def wait_until_done(task: asyncio.Task[Any]) -> None:
    """Wait until a task ended, however often the caller is cancelled meanwhile. Ignores the task's error.

    Raises:
        CancelledError: the caller was cancelled, after the task ended.
    """
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.cancelled():
        task.exception()  # asyncio logs an error that nothing retrieves
    if cancelled is not None:
        raise cancelled
