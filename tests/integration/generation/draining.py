"""SIGTERM to a generation service under load: what becomes of the requests that it had accepted."""

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
    """Of one drain."""

    accepted: int = 0
    """Rollouts accepted when the signal came."""
    whole_calls: int = 0
    """Calls that had begun before the signal, and gave every group."""
    broken_calls: int = 0
    """Calls that had begun before it, and ended with an error after they were accepted."""
    retryable: bool = True
    """Whether every error since said that another replica may be asked."""
    drain_s: float = 0.0
    """From the signal to the end of the process."""
    exit_status: int = 0


async def drain_under_load(process: Process, max_tokens: int, after_s: float) -> Outcome:
    """Keep callers asking, send SIGTERM `after_s` later, and wait for the end of all."""
    outcome = Outcome()
    stopped = asyncio.Event()
    address = process.addresses()["grpc"]

    async def call(client: AsyncGenerationClient, name: str) -> None:
        prompts = [Prompt(f"{name}.{i}", f"a {i}") for i in range(PROMPTS_A_CALL)]
        sampling = Sampling(max_tokens=max_tokens, seed=1)
        num_groups, began_before = 0, not stopped.is_set()
        try:
            groups = client.stream_trajectories("load", 0, prompts, num_rollouts=NUM_ROLLOUTS, sampling=sampling)
            async with contextlib.aclosing(groups):
                async for group in groups:
                    assert all(rollout.finish_reason in ("stop", "length") for rollout in group.rollouts)
                    num_groups += 1
        except PoiseClientError as error:
            outcome.retryable &= error.retryable
            outcome.broken_calls += began_before and error.reason != "DRAINING"
        outcome.whole_calls += began_before and num_groups == PROMPTS_A_CALL

    async def caller(index: int) -> None:
        async with AsyncGenerationClient(address, retries=RetryPolicy(max_attempts=1)) as client:
            for number in range(10**6):
                await call(client, f"{index}.{number}")
                if stopped.is_set():
                    return

    calling = [asyncio.create_task(caller(index)) for index in range(NUM_CALLERS)]
    await asyncio.sleep(after_s)
    status = await asyncio.to_thread(lambda: process.rest("GET", "/admin/v1/status").json())
    outcome.accepted = status["num_accepted"]
    started_s = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    stopped.set()
    outcome.exit_status = await asyncio.to_thread(process.exit_status)
    outcome.drain_s = time.monotonic() - started_s
    await asyncio.gather(*calling)
    return outcome
