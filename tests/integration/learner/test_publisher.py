from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from tests.integration.learner.replicas import NO_RETRIES, TIMEOUT_S, Replica, eventually

from poise.generation.served_policy import ServedPolicy
from poise.learner.config import PushConfig
from poise.learner.publishing import replica as module
from poise.learner.publishing.publisher import Publisher
from poise.learner.publishing.transports import make_transport
from poise.learner.publishing.weight_version import WeightVersion
from poise.runtime.network.discovery import Address, Discovery
from poise_client import AsyncGenerationClient
from poise_client.types import WeightArray


def version(number: int, lineage: str = "lineage") -> WeightVersion:
    """Weights that depend on their version, larger than one chunk."""
    weights = {
        "b.weight": WeightArray(np.full((1024, 300), number, np.float32), "float32"),
        "a.weight": WeightArray(np.arange(7, dtype=np.uint16) + number, "bfloat16"),
    }
    return WeightVersion.of(lineage, number, weights)


def served(published: WeightVersion) -> ServedPolicy:
    return ServedPolicy(published.lineage_id, published.policy_version, published.digest)


def connect(address: Address) -> AsyncGenerationClient:
    return AsyncGenerationClient(address.target, retries=NO_RETRIES)


def publisher_to(targets: list[str], config: PushConfig, connect: Callable[[Address], Any] = connect) -> Publisher:
    return Publisher(Discovery(targets), connect, make_transport(config), config)


@pytest.fixture
async def publisher() -> AsyncIterator[Callable[..., Publisher]]:
    """Starts a publisher for these replicas, with generous timeouts."""
    started: list[Publisher] = []

    def start(*replicas: Replica, **settings: Any) -> Publisher:
        config = PushConfig(**{"timeout_s": TIMEOUT_S, "reconcile_every_s": 0.02} | settings)
        started.append(publisher_to([one.address for one in replicas], config))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        await one.stop()


async def test_every_replica_serves_a_version_once_published(replica, publisher):
    replicas = [await replica() for _ in range(3)]
    sender = publisher(*replicas)
    for number in range(3):
        await sender.publish(version(number))
        for one, result in zip(replicas, sender.results, strict=True):
            assert one.policy == served(version(number))
            assert (result.address, result.policy_version, result.current, result.error) == (
                one.address,
                number,
                True,
                "",
            )
            assert result.push_s > 0
            assert result.pause_s == 0.25
    assert replicas[0].tensors["b.weight"] == version(2).weights["b.weight"].array.tobytes()
    assert replicas[0].tensors["a.weight"] == version(2).weights["a.weight"].array.tobytes()
    assert replicas[0].applied == [0, 1, 2]


async def test_version_already_served_is_not_pushed(replica, publisher):
    one = await replica()
    one.policy = served(version(4))
    sender = publisher(one)
    await sender.publish(version(4))
    assert one.num_pushes == 0
    assert sender.results[0].current


async def test_publishing_a_served_version_again_returns_at_once(replica, publisher):
    one, current = await replica(), version(1)
    sender = publisher(one)
    await sender.publish(current)
    one.answers.clear()
    before = one.num_requests
    await eventually(lambda: one.num_requests > before)
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(current)
    assert sender.results[0].current
    assert one.num_pushes == 1


async def test_version_after_a_hanging_one_is_waited_for(replica, publisher):
    one = await replica()
    one.release.clear()
    sender = publisher(one)
    first = asyncio.create_task(sender.publish(version(1)))
    await eventually(lambda: one.num_pushes)
    second = asyncio.create_task(sender.publish(version(2)))
    await first  # it is not waited for any more
    one.release.set()
    await second
    assert one.policy == served(version(2))
    assert one.applied == [1, 2]


async def test_publish_never_waits_longer_than_its_timeout():
    class Stuck:
        target = "nowhere:1"

        async def get_policy(self, *, timeout_s: float) -> None:
            await asyncio.Event().wait()

        async def close(self) -> None:
            pass

    sender = publisher_to(["nowhere:1"], PushConfig(timeout_s=0.1), lambda _: Stuck())
    sender.start()
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(1))
        await sender.publish(version(2))
    assert not sender.results[0].current
    await sender.stop()


async def test_without_replicas_there_is_nothing_to_wait_for(publisher):
    await publisher().publish(version(0))


async def test_dead_replica_delays_no_other_and_catches_up(replica, publisher, monkeypatch):
    monkeypatch.setattr(module, "_GET_POLICY_TIMEOUT_S", 10 * TIMEOUT_S)
    up, down = await replica(), await replica()
    await down.stop()
    sender = publisher(up, down, timeout_s=10 * TIMEOUT_S)
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(0))
        await sender.publish(version(1))
    assert up.policy == served(version(1))
    assert [result.current for result in sender.results] == [True, False]
    assert "GetPolicy" in sender.results[1].error
    await down.start()
    await eventually(lambda: sender.results[1].current)
    assert down.applied == [1]  # it skips the versions it missed


@pytest.mark.parametrize(
    "other",
    [ServedPolicy(), ServedPolicy("another", 9, b"x"), ServedPolicy("lineage", 2, b"x")],
    ids=["as loaded", "another lineage", "behind"],
)
async def test_replica_that_returns_with_other_weights_is_updated(replica, publisher, other):
    one, current = await replica(), version(3)
    sender = publisher(one)
    await sender.publish(current)
    await one.restart(other)
    await eventually(lambda: one.policy == served(current))
    await eventually(lambda: sender.results[0].current)


async def test_hanging_push_times_out_and_delays_no_other(replica, publisher):
    stuck, well = await replica(), await replica()
    stuck.release.clear()
    sender = publisher(stuck, well, timeout_s=1.0)
    publishing = asyncio.create_task(sender.publish(version(1)))
    await eventually(lambda: well.policy == served(version(1)))
    async with asyncio.timeout(TIMEOUT_S):
        await publishing
    assert not sender.results[0].current
    await eventually(lambda: sender.results[1].current)
    assert stuck.policy == ServedPolicy()
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(2))
    await eventually(lambda: well.policy == served(version(2)))
    stuck.release.set()
    await eventually(lambda: sender.results[0].current)
    assert stuck.policy == served(version(2))
    assert stuck.applied[-1] == 2


def wait_long(sender: Publisher) -> None:
    """Raise the timeouts of steps and pushes far above the duration of the test."""
    sender.config = sender.config.model_copy(update={"timeout_s": 10 * TIMEOUT_S})
    for one in sender.replicas.values():
        one.config = sender.config


async def test_late_replica_is_not_waited_for_until_it_catches_up(replica, publisher):
    slow, well = await replica(), await replica()
    slow.release.clear()
    sender = publisher(slow, well, timeout_s=0.5)
    await sender.publish(version(1))  # waits for its timeout, once
    wait_long(sender)
    async with asyncio.timeout(TIMEOUT_S):
        for number in range(2, 6):
            await sender.publish(version(number))
            assert well.policy == served(version(number))
    assert [result.current for result in sender.results] == [False, True]
    slow.release.set()
    await eventually(lambda: slow.policy == served(version(5)))
    await eventually(lambda: sender.results[0].current)
    slow.release.clear()
    publishing = asyncio.create_task(sender.publish(version(6)))  # it is waited for again
    pushes = slow.num_pushes
    await eventually(lambda: slow.num_pushes > pushes and well.policy == served(version(6)))
    assert not publishing.done()
    slow.release.set()
    await publishing
    assert slow.policy == served(version(6))


async def test_replica_without_a_version_is_waited_for_once(replica, publisher, monkeypatch):
    monkeypatch.setattr(module, "_GET_POLICY_TIMEOUT_S", 0.1)
    one = await replica()
    one.answers.clear()
    sender = publisher(one)
    await sender.publish(version(1))
    assert "GetPolicy" in sender.results[0].error
    monkeypatch.setattr(module, "_GET_POLICY_TIMEOUT_S", 10 * TIMEOUT_S)
    before = one.num_requests
    await eventually(lambda: one.num_requests > before)  # it gets a request and does not answer
    wait_long(sender)
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(2))
    one.answers.set()
    await eventually(lambda: one.policy == served(version(2)))


async def test_slow_replica_catches_up_in_the_background(replica, publisher):
    slow = await replica()
    slow.takes_s = 0.5
    sender = publisher(slow, timeout_s=0.2)
    await sender.publish(version(1))
    assert not sender.results[0].current
    await eventually(lambda: sender.results[0].current)
    assert slow.policy == served(version(1))


async def test_push_that_fails_midway_is_named_and_retried(replica, publisher):
    one = await replica()
    one.breaks = True
    sender = publisher(one)
    await sender.publish(version(1))
    assert not sender.results[0].current
    assert "the engine died" in sender.results[0].error
    one.breaks = False
    await eventually(lambda: sender.results[0].current)
    assert sender.results[0].error == ""


async def test_conflict_is_logged_once_until_resolved(replica, publisher, caplog):
    one = await replica()
    one.policy = ServedPolicy("lineage", 7, b"x")
    sender = publisher(one)
    await sender.publish(version(3))
    result = sender.results[0]
    assert (result.policy_version, result.current) == (7, False)
    assert "version 3 is older than version 7" in result.error
    before = one.num_requests
    await eventually(lambda: one.num_requests > before + 3)
    assert caplog.text.count("is not current") == 1
    await sender.publish(version(8))
    assert one.policy == served(version(8))
    assert sender.results[0].error == ""


async def test_publishing_survives_an_unexpected_error(replica, publisher, caplog):
    one = await replica()
    sender = publisher(one)
    broken = WeightVersion("lineage", 1, {"a": object()}, {}, b"x")  # type: ignore[dict-item]
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(broken)
    assert sender.results[0].error
    await sender.publish(version(2))
    assert one.policy == served(version(2))


async def test_replicas_follow_the_addresses_of_a_dns_name(replica):
    first, second, third = [await replica() for _ in range(3)]
    known = {first.address}

    async def resolve(host, port):
        return set(known)

    config = PushConfig(timeout_s=TIMEOUT_S, reconcile_every_s=0.02)
    sender = Publisher(
        Discovery([third.address, "dns:///replicas:1"], resolve), connect, make_transport(config), config
    )
    sender.start()
    await sender.publish(version(1))
    assert [result.address for result in sender.results] == [third.address, first.address]
    assert first.policy == third.policy == served(version(1))
    known.add(second.address)
    await eventually(lambda: second.policy == served(version(1)))
    known.remove(first.address)
    await eventually(lambda: len(sender.results) == 2)
    await sender.publish(version(2))
    assert (first.applied, second.applied, third.applied) == ([1], [1, 2], [1, 2])
    await sender.stop()


async def test_removed_replica_is_not_waited_for(replica):
    going = await replica()
    going.release.clear()
    known = {going.address}

    async def resolve(host, port):
        return set(known)

    config = PushConfig(timeout_s=10 * TIMEOUT_S, reconcile_every_s=0.02)
    sender = Publisher(Discovery(["dns:///replicas:1"], resolve), connect, make_transport(config), config)
    sender.start()
    publishing = asyncio.create_task(sender.publish(version(1)))
    await eventually(lambda: going.num_pushes)
    known.clear()
    async with asyncio.timeout(TIMEOUT_S):
        await publishing
    assert sender.results == ()
    await sender.stop()


async def test_unresolved_name_delays_a_step_only_until_its_timeout():
    async def resolve(host, port):
        await asyncio.Event().wait()

    config = PushConfig(timeout_s=0.05)
    sender = Publisher(Discovery(["dns:///replicas:1"], resolve), connect, make_transport(config), config)
    sender.start()
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(1))
    await sender.stop()


async def test_stopping_ends_a_push_that_hangs(replica, publisher):
    one = await replica()
    one.release.clear()
    sender = publisher(one)
    publishing = asyncio.create_task(sender.publish(version(1)))
    await eventually(lambda: one.num_pushes)
    async with asyncio.timeout(TIMEOUT_S):
        await sender.stop()
        await publishing


async def test_replica_without_a_client_has_a_reason_and_is_retried(replica, caplog):
    well, unread, broken = [await replica() for _ in range(3)]
    problems = {unread.address: FileNotFoundError("ca.pem"), broken.address: RuntimeError("a defect")}

    def connect_or_not(address: Address) -> AsyncGenerationClient:
        if address.target in problems:
            raise problems[address.target]
        return connect(address)

    config = PushConfig(timeout_s=10 * TIMEOUT_S, reconcile_every_s=0.02)
    targets = [unread.address, well.address, broken.address]
    sender = publisher_to(targets, config, connect_or_not)
    sender.start()
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(1))
    assert well.policy == served(version(1))
    by_address = {result.address: result for result in sender.results}
    assert by_address.keys() == set(targets)
    assert (by_address[unread.address].current, by_address[unread.address].error) == (
        False,
        "cannot connect: ca.pem",
    )
    assert "a defect" in by_address[broken.address].error
    problems.clear()
    await eventually(lambda: all(result.current for result in sender.results))
    assert unread.policy == broken.policy == served(version(1))
    assert caplog.text.count("cannot connect: ") == 2
    await sender.stop()


async def test_failed_discovery_is_logged_and_retried(replica, caplog):
    one = await replica()
    answers: list[Any] = [RuntimeError("a defect"), {one.address}]

    async def resolve(host, port):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    config = PushConfig(timeout_s=10 * TIMEOUT_S, reconcile_every_s=0.02)
    sender = Publisher(Discovery(["dns:///replicas:1"], resolve), connect, make_transport(config), config)
    sender.start()
    async with asyncio.timeout(TIMEOUT_S):
        await sender.publish(version(1))
    await eventually(lambda: one.policy == served(version(1)))
    assert "unexpected error while looking for replicas" in caplog.text
    await sender.stop()
