"""Pushes over a bad network to real replicas: dead, slow, flapping and restarting ones."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.learner.live_replicas import (
    FAULTS,
    LiveReplica,
    Proxy,
    published_versions,
    served_values,
    to_float32,
)
from tests.integration.learner.replicas import NO_RETRIES, TIMEOUT_S, eventually

from poise.errors import BackendDown
from poise.learner.config import PushConfig
from poise.learner.publishing.publisher import Publisher
from poise.learner.publishing.transports import make_transport
from poise.learner.publishing.weight_version import WeightVersion
from poise.runtime.network.discovery import Discovery
from poise_client import AsyncGenerationClient
from poise_client.types import Prompt, Sampling

NUM_VERSIONS = 8


@pytest.fixture(scope="module")
def versions(model: Path) -> list[WeightVersion]:
    return published_versions(model, NUM_VERSIONS + 1)


@contextlib.asynccontextmanager
async def chaos(model: Path, folder: Path, num_replicas: int = 3, **push: Any) -> AsyncIterator[tuple[Any, ...]]:
    replicas = [
        LiveReplica(model, folder / f"staging-{i}", shared_dirs=(folder / "shared",)) for i in range(num_replicas)
    ]
    proxies: list[Proxy] = []
    settings = {"timeout_s": TIMEOUT_S, "reconcile_every_s": 0.05, "shared_dir": folder / "shared"}
    config = PushConfig(**settings | push)
    try:
        for i, replica in enumerate(replicas):
            await replica.start()
            proxies.append(await Proxy(lambda replica=replica: replica.address, seed=i).start())
        publisher = Publisher(
            Discovery([proxy.address for proxy in proxies]),
            lambda address: AsyncGenerationClient(address.target, retries=NO_RETRIES),
            make_transport(config),
            config,
        )
        publisher.start()
        yield replicas, proxies, publisher
        await publisher.stop()
    finally:
        for one in (*proxies, *replicas):
            await one.stop()


AS_LOADED = -1


async def watch(replicas: list[LiveReplica], versions: list[WeightVersion], seen: list[set[int]]) -> None:
    """Check repeatedly that each replica serves exactly one version."""
    by_values = {served_values(version): version.policy_version for version in versions}
    by_values[await replicas[0].serves()] = AS_LOADED
    while True:
        for i, replica in enumerate(replicas):
            with contextlib.suppress(BackendDown, AttributeError):  # it is stopping, or has not loaded its model
                served = await replica.serves()
                assert served in by_values, f"replica {i} serves a mix"
                seen[i].add(by_values[served])
        await asyncio.sleep(0.005)


async def flap(proxy: Proxy, chance: random.Random) -> None:
    while True:
        await asyncio.sleep(chance.uniform(0.02, 0.2))
        await proxy.stop()
        await asyncio.sleep(chance.uniform(0.0, 0.1))
        await proxy.start()


@pytest.mark.parametrize("transport", ["grpc", "shared"])
async def test_replicas_never_mix_versions_and_agree_in_the_end(
    model: Path, versions: list[WeightVersion], tmp_path: Path, transport: str
) -> None:
    seen: list[set[int]] = [set(), set(), set()]
    async with chaos(model, tmp_path, transport=transport, timeout_s=1.0) as (replicas, proxies, publisher):
        watching = asyncio.create_task(watch(replicas, versions, seen))
        await eventually(lambda: all(seen))
        await publisher.publish(versions[0])
        await eventually(lambda: all(0 in numbers for numbers in seen))
        chance = random.Random(0)
        for proxy in proxies:
            proxy.faults = [fault for _ in range(20) for fault in (chance.choice(FAULTS), "")]
        flapping = asyncio.create_task(flap(proxies[2], random.Random(1)))
        for version in versions[1:]:
            match version.policy_version:
                case 2:
                    await proxies[0].stop()  # dead
                    proxies[1].piece_s = 0.15  # slow: a push takes longer than a step waits for it for it for it
                case 4:
                    await proxies[0].start()
                case 5:
                    await replicas[0].restart()
                case 6:
                    proxies[1].piece_s = 0.0
            await publisher.publish(version)
            # Steps do not wait for late replicas, so the test waits for one: otherwise all would skip versions.
            await eventually(lambda: any(result.current for result in publisher.results))
            assert not watching.done(), watching.exception()
        flapping.cancel()
        await asyncio.gather(flapping, return_exceptions=True)
        await proxies[2].stop()
        await proxies[2].start()
        for proxy in proxies:
            proxy.faults = []

        last = versions[-1]
        await eventually(lambda: all(result.current for result in publisher.results))
        await eventually(lambda: watching.done() or all(NUM_VERSIONS in numbers for numbers in seen))
        assert not watching.done(), watching.exception()
        watching.cancel()
        for replica, result in zip(replicas, publisher.results, strict=True):
            assert (result.policy_version, result.digest, result.error) == (NUM_VERSIONS, last.digest, "")
            assert await replica.serves() == served_values(last)
            await assert_samples_from(replica, last, model)
        assert sum(proxy.num_deltas for proxy in proxies) > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("transport", ["grpc", "shared"])
async def test_steps_continue_during_a_push_to_a_late_replica(
    model: Path, versions: list[WeightVersion], tmp_path: Path, transport: str
) -> None:
    async with chaos(model, tmp_path, transport=transport, timeout_s=0.5) as (replicas, proxies, publisher):
        await eventually(lambda: len(publisher.results) == 3)
        proxies[1].open.clear()
        await publisher.publish(versions[0])  # waits for its timeout, the first time
        # From now on a step that waits for it, or a push to it, would take longer than the test may.
        publisher.config = publisher.config.model_copy(update={"timeout_s": 10 * TIMEOUT_S})
        for one in publisher.replicas.values():
            one.config = publisher.config
        # Pushes with the old timeout fail.
        await eventually(lambda: [left_s > TIMEOUT_S for left_s in proxies[1].held_s] == [True])
        num_steps = 0
        async with asyncio.timeout(TIMEOUT_S):
            for version in versions[1:6]:
                await publisher.publish(version)
                await eventually(lambda: [result.current for result in publisher.results] == [True, False, True])
                num_steps += len(proxies[1].held_s) == 1
        assert num_steps == 5
        proxies[1].open.set()
        await eventually(lambda: all(result.current for result in publisher.results))
        for replica, result in zip(replicas, publisher.results, strict=True):
            assert (result.policy_version, result.digest) == (5, versions[5].digest)
            assert await replica.serves() == served_values(versions[5])


async def test_only_changes_are_sent_except_to_restarted_replicas(
    model: Path, versions: list[WeightVersion], tmp_path: Path
) -> None:
    async with chaos(model, tmp_path, num_replicas=2) as (replicas, proxies, publisher):
        sent = []
        for version in versions[1:4]:
            if version.policy_version == 3:
                await replicas[0].restart()
                await eventually(lambda: replicas[0].app.status()["policy_version"] == 2)
            await publisher.publish(version)
            await eventually(lambda: all(result.current for result in publisher.results))
            sent.append([result.sent_bytes for result in publisher.results])
            for replica in replicas:
                assert await replica.serves() == served_values(version)
        whole = sum(weight.array.nbytes for weight in versions[0].weights.values())
        assert sent[0] == [whole, whole]
        assert max(sent[1] + sent[2]) < whole / 30
        assert [proxy.num_deltas for proxy in proxies] == [2, 2]
        await replicas[0].restart()
        await eventually(lambda: publisher.results[0].current and publisher.results[0].sent_bytes == whole)
        assert await replicas[0].serves() == served_values(versions[3])


async def test_without_deltas_everything_is_sent_and_nothing_kept(
    model: Path, versions: list[WeightVersion], tmp_path: Path
) -> None:
    async with chaos(model, tmp_path, num_replicas=1, deltas=False) as (_, (proxy,), publisher):
        for version in versions[1:3]:
            await publisher.publish(version)
            await eventually(lambda: publisher.results[0].current)
            assert list((tmp_path / "0").rglob("*.safetensors")) == []
        assert proxy.num_deltas == 0


@pytest.mark.parametrize("transport", ["grpc", "shared"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_corrupted_push_changes_nothing_and_is_repeated(
    model: Path, versions: list[WeightVersion], tmp_path: Path, fault: str, transport: str
) -> None:
    seen: list[set[int]] = [set()]
    async with chaos(model, tmp_path, num_replicas=1, transport=transport) as (replicas, (proxy,), publisher):
        watching = asyncio.create_task(watch(replicas, versions, seen))
        await publisher.publish(versions[1])
        proxy.faults = [fault, fault, fault]  # the delta, and the retries
        await publisher.publish(versions[2])
        await eventually(lambda: publisher.results[0].current)
        assert not watching.done(), watching.exception()
        watching.cancel()
        assert proxy.faults == []
        # A rejected push is not repeated; an interrupted one is.
        assert proxy.num_deltas == (4 if fault == "cut the connection" else 1)
        assert await replicas[0].serves() == served_values(versions[2])
        assert publisher.results[0].digest == versions[2].digest


async def assert_samples_from(replica: LiveReplica, version: WeightVersion, model: Path) -> None:
    """Compare what a replica samples with transformers under the version's weights."""
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.load_state_dict({n: torch.tensor(to_float32(w)) for n, w in version.weights.items()}, strict=False)
    async with AsyncGenerationClient(replica.address) as client:
        groups = client.stream_trajectories(
            "run", 0, [Prompt("g", "after all")], num_rollouts=1, sampling=Sampling(max_tokens=8)
        )
        async with contextlib.aclosing(groups):
            (group,) = [one async for one in groups]
    (rollout,) = group.rollouts
    assert {span.policy_version for span in rollout.version_spans} == {version.policy_version}
    prompt, ids = group.prompt_token_ids.tolist(), rollout.token_ids.tolist()
    with torch.inference_mode():
        logprobs = torch.log_softmax(reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], -1)
    np.testing.assert_allclose(rollout.logprobs, logprobs[torch.arange(len(ids)), ids].numpy(), atol=1e-4)
