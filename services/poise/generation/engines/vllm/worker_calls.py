"""Calls to a vLLM that may die meanwhile: vLLM leaves those unanswered for ever when its engine's process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from poise.errors import BackendDown

_LOOK_S = 1.0
"""How often it is looked whether the engine still lives while it does not answer."""

Answer = TypeVar("Answer")


async def answered(engine: Any, call: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what a call to an `AsyncLLM` answers, or raise what it raises.

    Raises:
        BackendDown: the engine died before it answered.
    """
    task = asyncio.create_task(call)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_S)
            if not task.done() and engine.errored:
                raise BackendDown("vLLM ended")
    finally:
        task.cancel()
    return task.result()


async def ask_workers(engine: Any, method: str, *args: Any) -> list[Any]:
    """Call a method of the `PoiseWorker`s of an `AsyncLLM`, and return what each rank answers; see `answered`."""
    return await answered(engine, engine.collective_rpc(method, args=args))
