"""Sends SIGTERM to a generation service under load and counts the outcomes of accepted requests."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from dataclasses import dataclass

from tests.integration.generation.test_process import Process

from poise_client import AsyncGenerationClient, RetryPolicy
from poise_client.errors import PoiseClientError
from poise_client.types import Prompt, Sampling

NUM_CALLERS, PROMPTS_A_CALL, NUM_ROLLOUTS = 4, 4, 2


@dataclass
class Outcome:
    """The outcome of one drain."""

    accepted: int = 0
    """Rollouts accepted but not returned before the signal."""
    calls_in_flight: int = 0
    """Calls that these rollouts belong to."""
    whole_calls: int = 0
    """Calls among them that returned every group."""
    broken_calls: int = 0
    """Calls among them that ended with an error."""
    retryable: bool = True
    """Whether every error was retryable."""
    drain_s: float = 0.0
    """Seconds from the signal to the end of the process."""
    exit_status: int = 0


@dataclass(eq=False)
class _Call:
    num_groups: int = 0
    is_over: bool = False

    @property
    def num_rollouts_left(self) -> int:
        return (PROMPTS_A_CALL - self.num_groups) * NUM_ROLLOUTS


async def drain_under_load(process: Process, max_tokens: int, after_s: float) -> Outcome:
    """Start callers, send SIGTERM after `after_s`, and wait until all have ended."""
    outcome = Outcome()
    stopped, may_begin = asyncio.Event(), asyncio.Event()
    may_begin.set()
    calls: list[_Call] = []
    address = process.addresses()["grpc"]

    async def call_once(client: AsyncGenerationClient, name: str, call: _Call) -> None:
        prompts = [Prompt(f"{name}.{i}", f"a {i}") for i in range(PROMPTS_A_CALL)]
        sampling = Sampling(max_tokens=max_tokens, seed=1)
        try:
            groups = client.stream_trajectories("load", 0, prompts, num_rollouts=NUM_ROLLOUTS, sampling=sampling)
            async with contextlib.aclosing(groups):
                async for group in groups:
                    assert all(rollout.finish_reason in ("stop", "length") for rollout in group.rollouts)
                    call.num_groups += 1
        except PoiseClientError as error:
            outcome.retryable &= error.retryable
        finally:
            call.is_over = True

    async def caller(index: int) -> None:
        async with AsyncGenerationClient(address, retries=RetryPolicy(max_attempts=1)) as client:
            for number in range(10**6):
                await may_begin.wait()
                calls.append(_Call())
                await call_once(client, f"{index}.{number}", calls[-1])
                if stopped.is_set():
                    return

    async def in_flight() -> list[_Call]:
        """Stop starting calls. Return the running ones once the service has accepted all their rollouts."""
        may_begin.clear()
        while True:
            status = await asyncio.to_thread(lambda: process.rest("GET", "/admin/v1/status").json())
            running = [call for call in calls if not call.is_over]
            if status["num_accepted"] == sum(call.num_rollouts_left for call in running):
                return running

    calling = [asyncio.create_task(caller(index)) for index in range(NUM_CALLERS)]
    await asyncio.sleep(after_s)
    while not (accepted := await in_flight()):
        may_begin.set()
        await asyncio.sleep(0.05)
    outcome.accepted = sum(call.num_rollouts_left for call in accepted)
    outcome.calls_in_flight = len(accepted)
    started_s = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    stopped.set()
    may_begin.set()
    outcome.exit_status = await asyncio.to_thread(process.exit_status)
    outcome.drain_s = time.monotonic() - started_s
    await asyncio.gather(*calling)
    outcome.whole_calls = sum(call.num_groups == PROMPTS_A_CALL for call in accepted)
    outcome.broken_calls = len(accepted) - outcome.whole_calls
    return outcome
