"""A learner that trains and pushes only adapters, and real replicas that sample with them unmerged."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import peft
import pytest
import torch
import transformers
from tests.integration.learner.live_replicas import FAULTS, LiveReplica, Proxy
from tests.integration.learner.replicas import NO_RETRIES, TIMEOUT_S, eventually, interceptors
from tests.support.tiny_models import make_tiny_llama
from tests.unit.learner.batches import make_config

from poise.learner.app import LearnerApp, build
from poise_client import AsyncGenerationClient, AsyncLearnerClient
from poise_client.types import Batch, Group, Prompt, ReplicaResult, Sampling, StepResult

LORA = {"rank": 4, "alpha": 8}
TOLERANCE = 1e-5


@pytest.fixture
async def live(model: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts replicas that take adapters."""
    started: list[LiveReplica] = []

    async def start(**changes: Any) -> LiveReplica:
        settings = {"lora": {"max_rank": 8}, "wait_for_learner": True} | changes
        folder = settings.pop("model_folder", model)
        replica = LiveReplica(folder, tmp_path / f"staging-{len(started)}", **settings)
        started.append(await replica.start())
        return replica

    yield start
    for replica in started:
        await replica.stop()


@contextlib.asynccontextmanager
async def learner(model: Path, folder: Path, *addresses: str, **push: Any) -> AsyncIterator[AsyncLearnerClient]:
    app: LearnerApp = build(
        make_config(
            model,
            folder / "state",
            replicas=addresses,
            lora=LORA,
            push={"transport": "lora", "timeout_s": TIMEOUT_S, "reconcile_every_s": 0.05} | push,
            mini_batch_prompts=8,  # one update a step, so that the mismatch is that of the sampling policy
            optimizer={"learning_rate": 1e-2},
        )
    )
    server = grpc.aio.server(interceptors=interceptors("learner", app.registry))
    app.register(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        await app.start()
        async with AsyncLearnerClient(address, retries=NO_RETRIES, timeout_s=TIMEOUT_S) as client:
            yield client
    finally:
        await server.stop(None)
        await app.stop()


async def sample(address: str, step: int, version: int) -> list[Group]:
    prompts = [Prompt(f"g{i}", f"prompt {step} {i}") for i in range(3)]
    sampling = Sampling(max_tokens=12, seed=step)
    async with AsyncGenerationClient(address) as client:
        groups = client.stream_trajectories(
            "run", step, prompts, num_rollouts=2, sampling=sampling, min_policy_version=version, timeout_s=TIMEOUT_S
        )
        return [group async for group in groups]


def batch_of(groups: list[Group], step: int) -> Batch:
    rollouts = [dataclasses.replace(r, advantage=(-1.0) ** i) for g in groups for i, r in enumerate(g.rollouts)]
    return Batch("run", f"step-{step}", step, tuple(rollouts), 1.0)


async def step_on(client: AsyncLearnerClient, address: str, step: int) -> StepResult:
    """Sample with a version and train on the rollouts."""
    return await client.submit_advantages(batch_of(await sample(address, step, step), step))


async def until_current(client: AsyncLearnerClient) -> ReplicaResult:
    async with asyncio.timeout(TIMEOUT_S):
        while not (result := (await client.get_status()).replicas[0]).current:
            await asyncio.sleep(0.02)
    return result


async def refusal(client: AsyncLearnerClient) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        while not (error := (await client.get_status()).replicas[0].error):
            await asyncio.sleep(0.02)
    return error


async def test_the_policy_that_samples_is_the_one_that_is_trained(live, model: Path, tmp_path: Path) -> None:
    replica = await live()
    async with learner(model, tmp_path, replica.address) as client:
        await until_current(client)
        for step in range(3):
            result = await step_on(client, replica.address, step)
            assert result.metrics.num_rollouts == 6
            assert result.metrics.mismatch_logprob < TOLERANCE
            (pushed,) = result.replicas
            assert (pushed.policy_version, pushed.current, pushed.error) == (step + 1, True, "")
            status = await client.get_status()
            assert status.digest == pushed.digest == bytes.fromhex(replica.app.status()["digest"])
            assert 0 < pushed.sent_bytes < 0.3 * (model / "model.safetensors").stat().st_size
        await client.export_model("trained")
        groups = await sample(replica.address, 3, 3)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "state" / "exports" / "trained" / "adapter").eval()
    for group in groups:
        for rollout in group.rollouts:
            expected = logprobs(adapted, group.prompt_token_ids, rollout.token_ids)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=5 * TOLERANCE)
            with adapted.disable_adapter():
                unadapted = logprobs(adapted, group.prompt_token_ids, rollout.token_ids)
            assert abs(unadapted - expected).max() > 100 * TOLERANCE


@torch.inference_mode()
def logprobs(model: torch.nn.Module, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    all_logprobs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
    return all_logprobs[torch.arange(len(response)), ids[0, len(prompt) :]].numpy()


async def test_restarted_replica_gets_the_adapter_before_ready(live, model: Path, tmp_path: Path) -> None:
    replica = await live()
    async with learner(model, tmp_path, replica.address) as client:
        await until_current(client)
        await step_on(client, replica.address, 0)
        groups = await sample(replica.address, 1, 1)
        await replica.stop()
        assert (await client.submit_advantages(batch_of(groups, 1))).policy_version == 2
        await replica.start()
        assert replica.app.readiness().ready is False
        async with asyncio.timeout(TIMEOUT_S):
            while not replica.app.readiness().ready:
                await asyncio.sleep(0.02)
        assert replica.app.status()["policy_version"] == 2
        assert (await step_on(client, replica.address, 2)).metrics.mismatch_logprob < TOLERANCE


async def test_restarted_learner_sends_the_same_policy(live, model: Path, tmp_path: Path) -> None:
    replica = await live()
    async with learner(model, tmp_path, replica.address) as client:
        await until_current(client)
        await step_on(client, replica.address, 0)
        before = (await until_current(client)).digest
    async with learner(model, tmp_path, replica.address) as client:
        assert (await until_current(client)).digest == before
        assert (await client.get_status()).digest == before
        assert (await step_on(client, replica.address, 1)).metrics.mismatch_logprob < TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
async def test_replica_never_mixes_adapter_versions(live, model: Path, tmp_path: Path, fault: str) -> None:
    replica = await live()
    proxy = await Proxy(lambda: replica.address, seed=1).start()
    try:
        async with learner(model, tmp_path, proxy.address) as client:
            await until_current(client)
            groups = await sample(replica.address, 0, 0)
            proxy.faults = [fault] * 1000
            broken = await client.submit_advantages(batch_of(groups, 0))
            assert not broken.replicas[0].current
            assert replica.app.status()["policy_version"] == 0
            again = await sample(replica.address, 0, 0)
            assert {rollout.id: rollout.logprobs.tolist() for group in again for rollout in group.rollouts} == {
                rollout.id: rollout.logprobs.tolist() for group in groups for rollout in group.rollouts
            }
            proxy.faults.clear()
            await eventually(lambda: replica.app.status()["policy_version"] == 1)
            assert (await step_on(client, replica.address, 1)).metrics.mismatch_logprob < TOLERANCE
    finally:
        await proxy.stop()


async def test_a_replica_of_another_model_says_so(live, model: Path, tmp_path: Path) -> None:
    replica = await live(model_folder=make_tiny_llama(tmp_path / "other", seed=1))
    async with learner(model, tmp_path, replica.address) as client:
        assert "trained on the model with digest" in await refusal(client)
    assert replica.app.status()["lineage_id"] == ""
    assert not replica.app.readiness().ready


async def test_replica_rejects_the_other_kind_of_push(live, model: Path, tmp_path: Path) -> None:
    whole, adapters = await live(lora=None), await live()
    async with learner(model, tmp_path / "a", whole.address) as client:
        assert "`lora` is unset" in await refusal(client)
    async with learner(model, tmp_path / "b", adapters.address, transport="grpc") as client:
        assert "serves adapters only" in await refusal(client)
