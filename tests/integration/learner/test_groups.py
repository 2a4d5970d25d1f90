"""Pushes through process groups: replicas are separate processes, and gloo sends the bytes."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.generation.test_process import Process, run
from tests.integration.learner.live_replicas import LiveReplica, published_versions
from tests.integration.learner.replicas import NO_RETRIES, TIMEOUT_S

from poise.learner.config import PushConfig
from poise.learner.publishing import process_group as groups
from poise.learner.publishing.publisher import Publisher
from poise.learner.publishing.transports import make_transport
from poise.learner.publishing.weight_version import WeightVersion
from poise.runtime.network.discovery import Discovery
from poise_client import AsyncGenerationClient, GenerationClient, WeightPush
from poise_client.types import Policy

NUM_VERSIONS = 6


class Client(AsyncGenerationClient):
    """Records how each push was sent."""

    ways: list[str]

    async def push_weights(self, push: WeightPush, *, timeout_s: float | None = None) -> Any:
        way = "group" if push.manifest.HasField("process_group") else "grpc"
        self.ways.append(f"{way} delta" if push.is_delta else way)
        return await super().push_weights(push, timeout_s=timeout_s)


@pytest.fixture
def versions(model: Path, request: pytest.FixtureRequest) -> list[WeightVersion]:
    """Versions of a lineage that only this test uses."""
    lineage_id = hashlib.sha256(request.node.name.encode()).hexdigest()
    return [dataclasses.replace(version, lineage_id=lineage_id) for version in published_versions(model, NUM_VERSIONS)]


Start = Callable[..., Process]


@pytest.fixture(scope="module")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts replicas."""
    folder = tmp_path_factory.mktemp("replicas")
    numbers = itertools.count()
    settings = (f"model={model}", "dtype=float32", "nccl=true")
    command = ("poise.generation", *(part for one in settings for part in ("--set", one)))
    with ExitStack() as running:

        def start(port: int = 0) -> Process:
            return running.enter_context(run(folder / str(next(numbers)), *command, port=port))

        yield start


@pytest.fixture(scope="module")
def replicas(start: Start) -> tuple[Process, Process]:
    """Two replicas for all tests."""
    both = start(), start()
    for replica in both:
        replica.wait_until_ready()
    return both


@pytest.fixture
def replica(replicas: tuple[Process, Process]) -> Process:
    return replicas[0]


@pytest.fixture
async def publish() -> AsyncIterator[Callable[..., Any]]:
    """Starts publishers; returns each with a list of how its pushes were sent."""
    started: list[Publisher] = []

    def start(*replicas: Process | str, **settings: Any) -> tuple[Publisher, list[str]]:
        values = {"transport": "nccl", "timeout_s": TIMEOUT_S, "reconcile_every_s": 0.05} | settings
        config, ways = PushConfig(**values), []

        def connect(address: Any) -> Client:
            client = Client(address.target, retries=NO_RETRIES)
            client.ways = ways
            return client

        targets = [one if isinstance(one, str) else one.addresses()["grpc"] for one in replicas]
        started.append(Publisher(Discovery(targets), connect, make_transport(config), config))
        started[-1].start()
        return started[-1], ways

    yield start
    for publisher in started:
        await publisher.stop()


def served(replica: Process) -> Policy:
    # With retries: gRPC still reports an earlier refusal of the same address for a moment.
    with GenerationClient(replica.addresses()["grpc"], timeout_s=TIMEOUT_S) as client:
        return client.get_policy()


async def until_served(replica: Process, version: WeightVersion) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await asyncio.to_thread(served, replica)).digest != version.digest:
            await asyncio.sleep(0.05)


class Middle:
    """Pauses senders in the middle of a payload."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        pieces = groups.payload_pieces

        def held(push: WeightPush) -> Iterator[torch.Tensor]:
            for index, piece in enumerate(pieces(push)):
                if index == 3:
                    self.reached.set()
                    self.go_on.wait()
                yield piece

        monkeypatch.setattr(groups, "payload_pieces", held)


@pytest.fixture
def middle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Middle]:
    middle = Middle(monkeypatch)
    yield middle
    middle.go_on.set()


async def test_versions_and_deltas_use_one_process_group(replicas, publish, versions, caplog):
    publisher, ways = publish(*replicas)
    for version in versions[:4]:
        await publisher.publish(version)
        assert [(r.policy_version, r.current, r.error) for r in publisher.results] == [
            (version.policy_version, True, "")
        ] * 2
        for one in replicas:
            assert served(one).digest == version.digest
    assert ways == ["group"] * 2 + ["group delta"] * 6
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_full_versions_reuse_one_process_group(replica, publish, versions):
    publisher, ways = publish(replica, deltas=False)
    for version in versions[:3]:
        await publisher.publish(version)
        assert served(replica).digest == version.digest
    assert ways == ["group"] * 3


async def test_replica_without_a_group_falls_back_to_grpc(model, tmp_path, publish, versions, caplog):
    replica = await LiveReplica(model, tmp_path).start()
    try:
        publisher, ways = publish(replica.address)
        for version in versions[:2]:
            await publisher.publish(version)
            assert publisher.results[0].current
    finally:
        await replica.stop()
    assert ways == ["grpc", "grpc delta"]
    assert len([record for record in caplog.records if "Set `nccl`" in record.message]) == 1


async def test_damaged_payload_is_rejected_and_sent_over_grpc(replica, publish, versions, monkeypatch, caplog):
    publisher, ways = publish(replica, deltas=False)
    await publisher.publish(versions[0])
    pieces = groups.payload_pieces

    def damaged(push: WeightPush) -> Iterator[torch.Tensor]:
        for index, piece in enumerate(pieces(push)):
            yield piece ^ (index == 2)

    monkeypatch.setattr(groups, "payload_pieces", damaged)
    for version in versions[1:4]:
        await publisher.publish(version)
        await until_served(replica, version)
    assert ways[:3] == ["group", "group", "grpc"]
    assert ways.count("group") == 3  # after two failures no other is tried
    broken = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(broken) == 2
    assert "sha256" in broken[0]
    assert "all pushes now go over gRPC" in broken[1]


async def test_sender_lost_during_a_push_leaves_the_old_version(replica, publish, versions, middle):
    publisher, _ = publish(replica)
    middle.go_on.set()
    await publisher.publish(versions[0])
    middle.go_on.clear()
    middle.reached.clear()
    publishing = asyncio.create_task(publisher.publish(versions[1]))
    await asyncio.to_thread(middle.reached.wait)
    publishing.cancel()
    await publisher.stop()
    assert served(replica).digest == versions[0].digest
    middle.go_on.set()
    successor, _ = publish(replica)
    await successor.publish(versions[2])
    await until_served(replica, versions[2])
    assert not list((replica.log_file.parents[1] / "staging").rglob("payload-*"))


async def test_hanging_replica_costs_no_more_than_its_timeout(replicas, publish, versions, middle):
    hanging, other = replicas
    publisher, ways = publish(hanging, timeout_s=2.0)
    publishing = asyncio.create_task(publisher.publish(versions[0]))
    await asyncio.to_thread(middle.reached.wait)
    os.kill(hanging.process.pid, signal.SIGSTOP)
    middle.go_on.set()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await publishing
        assert not publisher.results[0].current
        assert served(other).ready
    finally:
        os.kill(hanging.process.pid, signal.SIGCONT)
    await until_served(hanging, versions[0])
    assert {"group", "grpc"} <= set(ways)


async def test_replica_killed_during_a_push_gets_a_new_group(start, publish, versions, middle):
    doomed = start()
    doomed.wait_until_ready()
    publisher, ways = publish(doomed)
    publishing = asyncio.create_task(publisher.publish(versions[0]))
    await asyncio.to_thread(middle.reached.wait)
    port = int(doomed.addresses()["grpc"].rpartition(":")[2])
    doomed.process.kill()
    doomed.process.wait()
    middle.go_on.set()
    async with asyncio.timeout(TIMEOUT_S / 2):  # not the whole timeout
        await publishing
    assert not publisher.results[0].current
    again = start(port)
    again.wait_until_ready()
    await until_served(again, versions[0])
    await publisher.publish(versions[1])
    assert publisher.results[0].current
    assert ways[0] == "group"
    assert ways[-1] == "group delta"
