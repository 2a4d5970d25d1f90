"""Sends SIGTERM to a value service under load and counts the labels."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.value import chaos
from tests.integration.value.service import TIMEOUT_S, Maker, ValueService, consumed

from poise_client import AsyncValueClient, RetryPolicy
from poise_client.errors import PoiseClientError

NUM_CALLERS, GROUPS_A_MESSAGE = 3, 4


@dataclass
class Outcome(chaos.Outcome):
    """Result of one drain: labels published before it, and the durable state at the end."""

    num_requests: int = 0
    """Answered requests."""
    retryable: bool = True
    """Whether every error was marked as retryable."""
    drain_s: float = 0.0
    exit_statuses: list[int] = field(default_factory=list)


async def drain_under_load(folder: Path, after_s: float) -> Outcome:
    """Send requests and labels, and SIGTERM after `after_s`. Restart, wait until all is learnt, and read the state."""
    outcome = Outcome()
    valkey = chaos.Valkey(folder)
    service = ValueService(folder, valkey.url, "queue.batch_entries=4", "probe.window_rows=100000")
    valkey.start()
    try:
        async with _started(service, outcome) as drain:
            callers = [asyncio.create_task(_call(service, index, outcome)) for index in range(NUM_CALLERS)]
            await asyncio.sleep(after_s)
            outcome.drain_s = await drain()
            await asyncio.gather(*callers)
        async with _started(service, outcome) as drain, service.client() as client:
            await consumed(client)
            await drain()
    finally:
        service.kill()
        valkey.kill()
    chaos.read_state(folder / "state", outcome)
    return outcome


@contextlib.asynccontextmanager
async def _started(service: ValueService, outcome: Outcome) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Yield a function that stops the service by SIGTERM and returns the seconds that it took."""
    service.start()
    await service.ready()
    process = service.process
    assert process is not None

    async def drain() -> float:
        started_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        outcome.exit_statuses.append(await asyncio.to_thread(process.wait, TIMEOUT_S))
        return time.monotonic() - started_s

    yield drain


async def _call(service: ValueService, index: int, outcome: Outcome) -> None:
    """Request baselines and publish labels until the service rejects a call."""
    make = Maker()
    async with AsyncValueClient(service.grpc, retries=RetryPolicy(max_attempts=1)) as client:
        for step in range(10**6):
            run = f"caller-{index}"
            queries = [make.query(f"{i}") for i in range(GROUPS_A_MESSAGE)]
            try:
                await client.estimate_baselines(run, step, queries, timeout_s=TIMEOUT_S)
                outcome.num_requests += 1
                await client.publish_labels([make.label(run, step, one) for one in queries], timeout_s=TIMEOUT_S)
            except PoiseClientError as error:
                outcome.retryable &= error.retryable
                return
            outcome.published |= {(run, step, one.group_id) for one in queries}
