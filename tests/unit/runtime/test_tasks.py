"""Work that must end even if its caller is cancelled."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from poise.runtime.tasks import wait_until_done


@pytest.mark.parametrize("num_cancels", [0, 1, 3])
async def test_cancellations_do_not_shorten_the_wait(num_cancels: int) -> None:
    release = asyncio.Event()
    task = asyncio.create_task(release.wait())
    waiting = asyncio.create_task(wait_until_done(task))
    await asyncio.sleep(0)
    for _ in range(num_cancels):
        waiting.cancel()
        await asyncio.sleep(0)
    assert not waiting.done()

    release.set()
    await asyncio.wait({waiting})
    assert task.done()
    assert waiting.cancelled() == (num_cancels > 0)


@pytest.mark.parametrize("num_cancels", [0, 1, 2])
async def test_error_of_abandoned_work_is_not_logged(num_cancels: int) -> None:
    logged: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    release = asyncio.Event()

    async def fail() -> None:
        await release.wait()
        raise ValueError("chunk.offset")

    waiting = asyncio.create_task(wait_until_done(asyncio.create_task(fail())))
    await asyncio.sleep(0)
    for _ in range(num_cancels):
        waiting.cancel()
        await asyncio.sleep(0)
    release.set()
    await asyncio.wait({waiting})
    gc.collect()
    assert logged == []


async def test_ended_work_needs_no_wait() -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    await wait_until_done(task)
