"""Connections that fail silently: pings detect them, and their calls are retried."""

import asyncio
from contextlib import AsyncExitStack

import numpy as np
from tests.support.forwarder import forwarding

from poise_client import (
    AsyncGenerationClient,
    AsyncLearnerClient,
    AsyncValueClient,
    RetryPolicy,
    WeightPush,
    errors,
)
from poise_client.types import Batch, Prompt, Rollout, RolloutId, WeightArray

FOUND_WITHIN_S = 60.0
NO_RETRIES = {"retries": RetryPolicy(max_attempts=1)}
BATCH = Batch(
    "run",
    "batch",
    0,
    (
        Rollout(
            RolloutId("run", 0, "g", 0), *[np.arange(2, dtype=np.int32)] * 2, np.zeros(2, np.float32), advantage=0.5
        ),
    ),
)
PUSH = WeightPush.prepare("lineage", 5, {"w": WeightArray(np.ones(3, np.float32), "float32")})


async def groups_of(client):
    prompts = [Prompt(name, "?") for name in "abc"]
    return [group.group_id async for group in client.stream_trajectories("run", 0, prompts, num_rollouts=1)]


async def test_calls_over_dead_connections_are_retried(target, generation_service, value_service, learner_service):
    services = (generation_service, value_service, learner_service)
    generation_service.script = [
        generation_service.stream("b", then=generation_service.hang),
        generation_service.hang,
    ]
    value_service.script = [value_service.hang]
    learner_service.script = [learner_service.hang] * 2
    uses = (  # all at once: each takes most of a minute
        (AsyncGenerationClient, {}, groups_of),
        (AsyncValueClient, {}, lambda client: client.get_probe(timeout_s=3600)),
        (AsyncLearnerClient, {}, lambda client: client.submit_advantages(BATCH, timeout_s=3600)),
        (AsyncLearnerClient, NO_RETRIES, lambda client: client.export_model("model", timeout_s=3600)),
        (AsyncGenerationClient, NO_RETRIES, lambda client: client.push_weights(PUSH, timeout_s=3600)),
    )
    async with AsyncExitStack() as stack:
        forwarders, calls = [], []
        for client_of, options, call in uses:
            forwarders.append(await stack.enter_async_context(forwarding(target)))
            client = await stack.enter_async_context(client_of(forwarders[-1].address, **options))
            calls.append(asyncio.create_task(call(client)))
            while sum(len(service.requests) for service in services) < len(calls):
                await asyncio.sleep(0.01)
        for forwarder in forwarders:
            forwarder.go_silent()

        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), FOUND_WITHIN_S)

    groups, report, result, *refusals = outcomes
    assert sorted(groups) == ["a", "b", "c"]
    assert report.num_pending == 4
    assert result.policy_version == 9
    assert [forwarder.num_connections for forwarder in forwarders[:3]] == [2, 2, 2]
    assert [type(error) for error in refusals] == [errors.UnavailableError] * 2
    assert all(error.retryable for error in refusals)
