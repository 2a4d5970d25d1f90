"""Sends SIGTERM to a learner during a step."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from tests.integration.learner.test_resume import DEADLINE_S, Learner
from tests.unit.learner.batches import make_group

from poise_client import AsyncLearnerClient, RetryPolicy
from poise_client.types import Batch

NUM_PROMPTS = 40
"""With two prompts a mini-batch, a step of 20 updates."""


@dataclass
class Outcome:
    """The outcome of one drain."""

    policy_version: int
    """The version in the answer to the current batch."""
    version_after: int
    """The learner's version after a restart."""
    drain_s: float
    exit_status: int


async def drain_within_a_step(model: Path, folder: Path) -> Outcome:
    """Send SIGTERM during training, then restart the learner."""
    learner = Learner(model, folder)
    learner.start("nowhere")
    try:
        async with asyncio.timeout(DEADLINE_S):
            addresses = await _ready(learner)
            async with AsyncLearnerClient(addresses["grpc"], retries=RetryPolicy(max_attempts=1)) as client:
                step = asyncio.create_task(client.submit_advantages(_long_batch()))
                async with httpx.AsyncClient(base_url=f"http://{addresses['admin']}") as rest:
                    while (await rest.get("/admin/v1/status")).json()["state"] != "training":
                        await asyncio.sleep(0.01)
                assert learner.process is not None
                started_s = time.monotonic()
                learner.process.send_signal(signal.SIGTERM)
                version = (await step).policy_version
                status = await asyncio.to_thread(learner.process.wait, DEADLINE_S)
                drain_s = time.monotonic() - started_s
            learner.start("nowhere")
            addresses = await _ready(learner)
            async with AsyncLearnerClient(addresses["grpc"]) as client:
                return Outcome(version, (await client.get_status()).policy_version, drain_s, status)
    finally:
        assert learner.process is not None
        learner.process.kill()
        learner.process.wait()


def _long_batch() -> Batch:
    random = np.random.default_rng(0)
    groups = [make_group(random, f"g{i}", 8, (24, 24)) for i in range(NUM_PROMPTS)]
    return Batch("run", "step-0", 0, tuple(rollout for group in groups for rollout in group))


async def _ready(learner: Learner) -> dict[str, str]:
    path = learner.folder / "address.json"
    while not path.exists():
        await asyncio.sleep(0.05)
    addresses: dict[str, str] = json.loads(path.read_text())
    async with httpx.AsyncClient(base_url=f"http://{addresses['admin']}") as rest:
        while (await rest.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.05)
    return addresses
