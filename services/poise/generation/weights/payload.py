"""The body of a push that comes through a group of processes, and waiting for it. Knows neither torch nor vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from poise.errors import BackendDown
from poise.runtime.network.broadcast_group import Rendezvous

_ASK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class Body:
    """What is to come, and where it goes."""

    rendezvous: Rendezvous
    part_bytes: tuple[int, ...]
    """Sizes of what follows each other in it."""
    header: bytes
    """What precedes it in the file."""
    path: Path
    timeout_s: float


async def wait_for_body(
    ask: Callable[[], Awaitable[str | None]], abandon: Callable[[], Awaitable[None]], timeout_s: float
) -> None:
    """Return when a body has come.

    Args:
        ask: gives what went wrong; empty when all came; None while it comes.
        abandon: has the receiver give up.
        timeout_s: how long that may take.

    Raises:
        BackendDown: it did not come, or not in time. The receiver has then given it up.
    """
    outcome: str | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while (outcome := await ask()) is None:  # noqa: ASYNC110 (the receiver may be in another process)
                await asyncio.sleep(_ASK_EVERY_S)
    except TimeoutError:
        outcome = f"nothing more came within {timeout_s:.0f} s"
    finally:
        if outcome != "":
            await asyncio.shield(abandon())
    if outcome:
        raise BackendDown(f"the body did not come through its group: {outcome}")
