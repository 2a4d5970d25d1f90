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
    """Of one drain; what was published before it, and what the durable state holds in the end."""

    num_questions: int = 0
    """Answered."""
    retryable: bool = True
    """Whether every error said that the call may be made again."""
    drain_s: float = 0.0
    exit_statuses: list[int] = field(default_factory=list)


async def drain_under_load(folder: Path, after_s: float) -> Outcome:
    """Keep publishing and asking, send SIGTERM `after_s` later; start again, let all be learnt, and read the state."""
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
    """Give what ends it by SIGTERM and returns the seconds that it took."""
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
    """Ask and publish, again and again, until the service refuses."""
    make = Maker()
    async with AsyncValueClient(service.grpc, retries=RetryPolicy(max_attempts=1)) as client:
        for step in range(10**6):
            run = f"caller-{index}"
            questions = [make.question(f"{i}") for i in range(GROUPS_A_MESSAGE)]
            try:
                await client.estimate_baselines(run, step, questions, timeout_s=TIMEOUT_S)
                outcome.num_questions += 1
                await client.publish_labels([make.label(run, step, one) for one in questions], timeout_s=TIMEOUT_S)
            except PoiseClientError as error:
                outcome.retryable &= error.retryable
                return
            outcome.published |= {(run, step, one.group_id) for one in questions}
