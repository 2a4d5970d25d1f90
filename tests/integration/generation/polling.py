"""Waiting for conditions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

DEADLINE_S = 300.0


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Return once `condition` is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not await condition():
        assert time.monotonic() < deadline, f"it never happened: {what}"
        await asyncio.sleep(0.005)
