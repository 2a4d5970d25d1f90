"""The order invariant over gRPC: no baseline comes from a probe that has seen a label of the step."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict

import numpy as np
import pytest
import redis.asyncio
from tests.integration.value.service import Maker, ValueService, consumed, eventually, fitted, numbers, warm_up

from poise_client import AsyncValueClient
from poise_client.codec import encode
from poise_client.errors import LabelsConsumedError, PoiseClientError, UnavailableError
from poise_proto.v1 import value_pb2


@pytest.fixture
async def paused(shared: ValueService, client: AsyncValueClient):
    await shared.post("pause")
    yield
    await shared.post("resume")


async def test_a_step_with_consumed_labels_stays_rejected(client, make) -> None:
    await warm_up(client, make, "late")
    await client.publish_labels([make.label("late", 3, group_id="a", domain="late")])
    await consumed(client)
    for group_id, domain in (("a", "late"), ("b", "late"), ("a", "another"), ("a", "")):
        with pytest.raises(LabelsConsumedError, match="step 3 of run 'late'") as caught:
            await client.estimate_baselines("late", 3, [make.query(group_id, domain)])
        assert "RLOO" in caught.value.remedy
    assert (await client.estimate_baselines("late", 4, [make.query(domain="late")]))[0].values is not None
    assert (await client.estimate_baselines("late.2", 3, [make.query(domain="late")]))[0].values is not None


async def test_labels_queued_directly_block_their_step(shared, client, make, valkey_url) -> None:
    label = encode(make.label("bypass", 0, domain="bypass"), value_pb2.LabelledGroup)
    async with redis.asyncio.from_url(valkey_url) as server:
        await server.xadd(shared.folder.name, {"group": label.SerializeToString()})
    await consumed(client)
    with pytest.raises(LabelsConsumedError):
        await client.estimate_baselines("bypass", 0, [make.query(domain="bypass")])


async def test_labels_still_in_the_queue_do_not_block_their_step(shared, client, make, paused) -> None:
    """The labels are published before the step's first request and learnt after it."""
    await shared.post("resume")
    await warm_up(client, make, "waits")
    await shared.post("pause")
    query = make.query(domain="waits")
    await client.publish_labels([make.label("waits", 0, query)])
    first = await client.estimate_baselines("waits", 0, [query])
    assert first[0].values is not None
    await shared.post("resume")
    await consumed(client)
    await fitted(client, "waits", first[0].probe_version + 1)
    assert numbers(await client.estimate_baselines("waits", 0, [query])) == numbers(first)


async def test_a_pinned_step_keeps_its_answer_after_refits(client, make) -> None:
    await warm_up(client, make, "pinned")
    queries = [make.query(f"g{i}", "pinned") for i in range(5)]
    first = await client.estimate_baselines("pinned", 0, queries)
    for i, query in enumerate(queries):
        await client.publish_labels([make.label("pinned", 0, query)])
        await consumed(client)
        await fitted(client, "pinned", 2 + i)
        assert numbers(await client.estimate_baselines("pinned", 0, queries)) == numbers(first)
    assert (await client.estimate_baselines("pinned", 1, queries))[0].probe_version >= 6


async def test_all_requests_of_a_step_are_answered_by_one_probe(client, make) -> None:
    """Labels of the first part arrive before the request about the second."""
    await warm_up(client, make, "parts")
    first, second = make.query("a", "parts"), make.query("b", "parts")
    (before,) = await client.estimate_baselines("parts", 0, [first])
    await client.publish_labels([make.label("parts", 0, first)])
    await consumed(client)
    await fitted(client, "parts", before.probe_version + 1)
    (after,) = await client.estimate_baselines("parts", 0, [second])
    assert after.probe_version == before.probe_version


async def test_a_domain_pinned_without_a_probe_has_none_in_that_step(client, make) -> None:
    query = make.query(domain="young")
    assert (await client.estimate_baselines("young", 0, [query]))[0].values is None
    await client.publish_labels([make.label("young", step, domain="young", n=4) for step in range(3)])
    await fitted(client, "young", 1)
    assert (await client.estimate_baselines("young", 0, [query]))[0].values is None
    assert (await client.estimate_baselines("young", 3, [query]))[0].values is not None


async def test_a_dead_lettered_label_does_not_block_its_step(shared, client, make) -> None:
    await warm_up(client, make, "poison")
    before = (await client.get_probe()).num_dead_letters
    await shared.post("pause")
    # The request is accepted: the domain does not exist yet, so its width is unknown.
    await client.publish_labels([make.label("poison", 0, group_id=name, domain="poison.2") for name in ("a", "b")])
    await client.publish_labels([make.label("poison", 1, domain="poison.2", width=5)])
    await shared.post("resume")
    await consumed(client)
    while (await client.get_probe()).num_dead_letters == before:  # counted after the rest of its batch is saved
        await asyncio.sleep(0.05)
    assert (await client.get_probe()).num_dead_letters == before + 1
    assert (await client.estimate_baselines("poison", 1, [make.query(domain="poison")]))[0].values is not None


async def test_a_pinned_step_survives_kill_9_of_the_service(shared, client, make) -> None:
    await warm_up(client, make, "killed")
    query = make.query("a", "killed")
    pinned = await client.estimate_baselines("killed", 0, [query])
    await client.publish_labels([make.label("killed", 0, query), make.label("killed", 1, domain="killed")])
    await consumed(client)
    await fitted(client, "killed", pinned[0].probe_version + 1)
    unconsumed = await client.estimate_baselines("killed", 2, [query])
    shared.kill()
    shared.start()
    await shared.ready()
    assert numbers(await client.estimate_baselines("killed", 0, [query])) == numbers(pinned)
    assert numbers(await client.estimate_baselines("killed", 2, [query])) == numbers(unconsumed)
    with pytest.raises(LabelsConsumedError):
        await client.estimate_baselines("killed", 1, [query])


NUM_CLIENTS, MIN_TURNS = 8, 768
DOMAINS = ("storm.math", "storm.code")


async def test_concurrent_requests_with_a_kill_leak_no_label(shared, client, make) -> None:
    lives = [0]
    answers: list[tuple[str, int, str, int]] = []
    """Run, step, domain, version."""
    answers_by_group: dict[tuple[int, str, int, str], set[tuple[int, bytes, bytes]]] = defaultdict(set)
    """The different answers, by process, run, step and group."""
    versions, lives_answered, num_rejected = set[int](), set[int](), 0
    queries = {domain: [make.query(f"{domain}{i}", domain) for i in range(3)] for domain in DOMAINS}

    def is_enough() -> bool:
        """Whether many probes answered, before and after the kill, and many requests came too late."""
        return len(versions) > 6 and len(answers) > 200 and num_rejected > 20 and lives_answered >= {0, 1}

    turns = itertools.takewhile(lambda turn: turn < MIN_TURNS or not is_enough(), itertools.count())

    async def one_client(number: int) -> None:
        nonlocal num_rejected, versions
        random, labels, late = np.random.default_rng(number), Maker(), list[int]()
        async with shared.client() as own:
            for turn in turns:
                # The clients advance together: a step requested much later than others could have lost its pin.
                run, step = f"storm{number % 3}", turn // (4 * NUM_CLIENTS) + int(random.integers(4))
                domain = DOMAINS[int(random.integers(2))]
                groups = queries[domain]
                life = lives[-1]
                try:
                    if random.random() < 0.45:
                        group = labels.query(f"c{number}.{turn}", domain)
                        await own.publish_labels([labels.label(run, step, group), labels.label("late", turn, group)])
                        late.append(turn)
                        continue
                    if len(late) > 4:

                        async def is_consumed() -> bool:
                            """Whether fewer labels are queued than this client published later. The queue is FIFO."""
                            return (await own.get_probe()).num_pending < 2 * 4

                        await eventually(is_consumed, "the oldest late label is consumed")
                        await own.estimate_baselines("late", late.pop(0), groups)
                    responses = await own.estimate_baselines(run, step, groups)
                except LabelsConsumedError:
                    num_rejected += 1
                    continue
                except UnavailableError:  # the restart took too long
                    continue
                answers.extend((run, step, domain, answer.probe_version) for answer in responses)
                versions |= {answer.probe_version for answer in responses}
                if life == lives[-1]:
                    lives_answered.add(life)
                    for answer, which in zip(responses, numbers(responses), strict=True):
                        answers_by_group[life, run, step, answer.group_id].add(which)

    async def one_kill() -> None:
        await eventually(lambda: len(versions) > 3, "a few versions answered")
        lives.append(-1)
        shared.kill()
        shared.start()
        await shared.ready()
        lives.append(1)

    await asyncio.gather(one_kill(), *(one_client(number) for number in range(NUM_CLIENTS)))
    await consumed(client)
    seen = shared.seen_by_version()
    leaks = [answer for answer in answers if answer[3] and (answer[0], answer[1]) in seen[answer[2], answer[3]]]
    assert leaks == []
    assert all(len(different) == 1 for different in answers_by_group.values())


async def test_invalid_requests_name_their_fields_and_pin_nothing(client, make) -> None:
    with pytest.raises(PoiseClientError) as caught:
        await client.estimate_baselines("a b", 0, [make.query(""), make.query("g", "x y")])
    assert [field for field, _ in caught.value.violations] == ["run_id", "groups[0].group_id", "groups[1].domain"]
    with pytest.raises(PoiseClientError):
        await client.estimate_baselines("wrong", 0, [make.query("")])
    await client.publish_labels([make.label("wrong", 0, domain="wrong")])
    await consumed(client)
    with pytest.raises(LabelsConsumedError):
        await client.estimate_baselines("wrong", 0, [make.query()])
