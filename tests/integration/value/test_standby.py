"""Several value services on one state folder: one holds it, the others pass calls on to it and wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.value.service import Maker, ValueService, consumed, eventually, numbers, warm_up

from poise_client.errors import InvalidRequestError, LabelsConsumedError, NotFoundError, UnavailableError


@pytest.fixture
def replicas(build: Callable[..., ValueService], tmp_path: Path) -> Iterator[list[ValueService]]:
    """Three on one folder and one queue, none started."""
    shared = (f"state_dir={tmp_path / 'state'}", f"queue.stream={tmp_path.name}", "standby.enabled=true")
    services = []
    for index in range(3):
        folder = tmp_path / f"replica-{index}"
        folder.mkdir()
        services.append(build(*shared, folder=folder))
    yield services


async def started(replicas: list[ValueService]) -> ValueService:
    """Start all; return the one that holds the state."""
    for service in replicas:
        service.start()
    for service in replicas:
        await service.ready()
    return await holder(replicas)


async def holder(replicas: list[ValueService]) -> ValueService:
    async def serving() -> ValueService | None:
        states = {service: (await service.status()).get("state") for service in replicas}
        found = [service for service, state in states.items() if state == "serving"]
        assert len(found) <= 1
        return found[0] if found else None

    found: ValueService = await eventually(serving, "one holds the state")
    return found


async def test_all_answer_alike_and_one_that_is_killed_is_stood_in_for(
    replicas: list[ValueService], make: Maker
) -> None:
    first = await started(replicas)
    others = [service for service in replicas if service is not first]
    async with others[0].client() as through:
        await warm_up(through, make)

    questions = [make.question(f"g{i}") for i in range(5)]
    labels = [make.label("run", 0, question) for question in questions]
    answers = []
    for service in replicas:
        async with service.client() as client:
            answers.append(numbers(await client.estimate_baselines("run", 0, questions)))
            assert [probe.domain for probe in (await client.get_probe()).probes] == ["default"]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0][0] >= 1

    # A step that nobody asked about before its labels came is refused by all.
    async with others[1].client() as client:
        await client.publish_labels([*labels, make.label("run", 1)])
        await consumed(client)
    for service in replicas:
        async with service.client() as client:
            with pytest.raises(LabelsConsumedError):
                await client.estimate_baselines("run", 1, [make.question()])

    first.kill()
    second = await holder(others)
    for service in others:
        await service.ready()
        async with service.client() as client:
            assert numbers(await client.estimate_baselines("run", 0, questions)) == answers[0]
            with pytest.raises(LabelsConsumedError):
                await client.estimate_baselines("run", 1, [make.question()])
            await client.publish_labels(labels)  # again: learnt once all the same
            await consumed(client)
            report = await client.get_probe()
            assert report.num_groups_consumed == 8 + len(labels) + 1

    first.start()  # and stands by from now on
    await first.ready()
    assert (await first.status())["holder"] == second.grpc
    async with first.client() as client:
        assert numbers(await client.estimate_baselines("run", 0, questions)) == answers[0]


async def test_no_label_is_lost_or_doubled_while_holders_die(replicas: list[ValueService], make: Maker) -> None:
    await started(replicas)
    num_published = 0
    for step in range(3):
        for service in replicas:
            async with service.client() as client:
                await client.publish_labels([make.label("run", step, make.question(f"{service.grpc}/{step}"))])
                num_published += 1
        held = await holder(replicas)
        held.kill()
        await holder([service for service in replicas if service is not held])
        held.start()
    for service in replicas:
        await service.ready()
        async with service.client() as client:
            await consumed(client)
            report = await client.get_probe()
            assert (report.num_groups_consumed, report.num_dead_letters) == (num_published, 0)


async def test_errors_come_through_a_standby_as_they_are(replicas: list[ValueService], make: Maker) -> None:
    first = await started(replicas)
    (standby, *_) = [service for service in replicas if service is not first]
    async with standby.client() as client:
        with pytest.raises(InvalidRequestError) as wrong:
            await client.estimate_baselines("run", 0, [make.question().scored([7, 7])])
        assert [field for field, _ in wrong.value.violations] == ["groups[0].rewards"]
        with pytest.raises(NotFoundError, match="known: none yet"):
            await client.get_probe("nothing")
    refused = await standby.post("checkpoint")
    assert refused.status_code == 503
    assert first.grpc in refused.text


async def test_a_standby_says_that_its_holder_is_away_and_passes_on_in_no_circle(
    build: Callable[..., ValueService], tmp_path: Path, make: Maker
) -> None:
    """A folder held by a process that is none of ours, and said to be held by the standby itself."""
    import fcntl

    state = tmp_path / "state"
    state.mkdir()
    service = build(f"state_dir={state}", "standby.enabled=true")
    (state / "holder.json").write_text(json.dumps({"address": service.grpc}))
    with (state / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        service.start()
        await service.not_ready_reason("which holds the state, is not ready")
        async with service.client() as client:
            with pytest.raises(UnavailableError, match="does not hold the state"):
                await asyncio.wait_for(client.estimate_baselines("run", 0, [make.question()], timeout_s=5), 30)
    await service.ready()
    assert (await service.status())["state"] == "serving"
