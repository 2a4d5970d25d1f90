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


async def test_a_step_whose_labels_came_first_stays_rejected(client, make) -> None:
    await warm_up(client, make, "late")
    await client.publish_labels([make.label("late", 3, group_id="a", domain="late")])
    await consumed(client)
    for group_id, domain in (("a", "late"), ("b", "late"), ("a", "another"), ("a", "")):
        with pytest.raises(LabelsConsumedError, match="step 3 of run 'late'") as caught:
            await client.estimate_baselines("late", 3, [make.question(group_id, domain)])
        assert "RLOO" in caught.value.remedy
    assert (await client.estimate_baselines("late", 4, [make.question(domain="late")]))[0].values is not None
    assert (await client.estimate_baselines("late.2", 3, [make.question(domain="late")]))[0].values is not None


async def test_labels_that_bypassed_the_service_close_their_step(shared, client, make, valkey_url) -> None:
    label = encode(make.label("bypass", 0, domain="bypass"), value_pb2.LabelledGroup)
    async with redis.asyncio.from_url(valkey_url) as server:
        await server.xadd(shared.folder.name, {"group": label.SerializeToString()})
    await consumed(client)
    with pytest.raises(LabelsConsumedError):
        await client.estimate_baselines("bypass", 0, [make.question(domain="bypass")])


async def test_labels_in_the_queue_do_not_close_their_step(shared, client, make, paused) -> None:
    """Published before the first question, learnt after it."""
    await shared.post("resume")
    await warm_up(client, make, "waits")
    await shared.post("pause")
    question = make.question(domain="waits")
    await client.publish_labels([make.label("waits", 0, question)])
    first = await client.estimate_baselines("waits", 0, [question])
    assert first[0].values is not None
    await shared.post("resume")
    await consumed(client)
    await fitted(client, "waits", first[0].probe_version + 1)
    assert numbers(await client.estimate_baselines("waits", 0, [question])) == numbers(first)


async def test_a_pinned_step_keeps_its_answer_over_refits(client, make) -> None:
    await warm_up(client, make, "pinned")
    questions = [make.question(f"g{i}", "pinned") for i in range(5)]
    first = await client.estimate_baselines("pinned", 0, questions)
    for i, question in enumerate(questions):
        await client.publish_labels([make.label("pinned", 0, question)])
        await consumed(client)
        await fitted(client, "pinned", 2 + i)
        assert numbers(await client.estimate_baselines("pinned", 0, questions)) == numbers(first)
    assert (await client.estimate_baselines("pinned", 1, questions))[0].probe_version >= 6


async def test_a_step_asked_about_in_parts_is_answered_by_one_probe(client, make) -> None:
    """Labels of the first part race ahead of the question about the second."""
    await warm_up(client, make, "parts")
    first, second = make.question("a", "parts"), make.question("b", "parts")
    (before,) = await client.estimate_baselines("parts", 0, [first])
    await client.publish_labels([make.label("parts", 0, first)])
    await consumed(client)
    await fitted(client, "parts", before.probe_version + 1)
    (after,) = await client.estimate_baselines("parts", 0, [second])
    assert after.probe_version == before.probe_version


async def test_a_domain_pinned_without_a_probe_has_none_in_that_step(client, make) -> None:
    question = make.question(domain="young")
    assert (await client.estimate_baselines("young", 0, [question]))[0].values is None
    await client.publish_labels([make.label("young", step, domain="young", n=4) for step in range(3)])
    await fitted(client, "young", 1)
    assert (await client.estimate_baselines("young", 0, [question]))[0].values is None
    assert (await client.estimate_baselines("young", 3, [question]))[0].values is not None


async def test_a_dead_lettered_label_does_not_taint_its_step(shared, client, make) -> None:
    await warm_up(client, make, "poison")
    before = (await client.get_probe()).num_dead_letters
    await shared.post("pause")
    # At the door nothing is wrong with it: the domain it disagrees with is not known yet.
    await client.publish_labels([make.label("poison", 0, group_id=name, domain="poison.2") for name in ("a", "b")])
    await client.publish_labels([make.label("poison", 1, domain="poison.2", width=5)])
    await shared.post("resume")
    await consumed(client)
    while (await client.get_probe()).num_dead_letters == before:  # told after what it was read with is settled
        await asyncio.sleep(0.05)
    assert (await client.get_probe()).num_dead_letters == before + 1
    assert (await client.estimate_baselines("poison", 1, [make.question(domain="poison")]))[0].values is not None


async def test_a_pinned_step_survives_kill_9_of_the_service(shared, client, make) -> None:
    await warm_up(client, make, "killed")
    question = make.question("a", "killed")
    pinned = await client.estimate_baselines("killed", 0, [question])
    await client.publish_labels([make.label("killed", 0, question), make.label("killed", 1, domain="killed")])
    await consumed(client)
    await fitted(client, "killed", pinned[0].probe_version + 1)
    unconsumed = await client.estimate_baselines("killed", 2, [question])
    shared.kill()
    shared.start()
    await shared.ready()
    assert numbers(await client.estimate_baselines("killed", 0, [question])) == numbers(pinned)
    assert numbers(await client.estimate_baselines("killed", 2, [question])) == numbers(unconsumed)
    with pytest.raises(LabelsConsumedError):
        await client.estimate_baselines("killed", 1, [question])


NUM_CLIENTS, MIN_TURNS = 8, 768
DOMAINS = ("storm.math", "storm.code")


async def test_a_storm_of_requests_with_a_kill_leaks_no_label(shared, client, make) -> None:
    lives = [0]
    answers: list[tuple[str, int, str, int]] = []
    """Run, step, domain, version."""
    told: dict[tuple[int, str, int, str], set[tuple[int, bytes, bytes]]] = defaultdict(set)
    """By life, run, step and group: the different answers given."""
    versions, lives_told, num_refused = set[int](), set[int](), 0
    questions = {domain: [make.question(f"{domain}{i}", domain) for i in range(3)] for domain in DOMAINS}

    def was_a_storm() -> bool:
        """Many probes answered, before and after the kill, and many questions came too late."""
        return len(versions) > 6 and len(answers) > 200 and num_refused > 20 and lives_told >= {0, 1}

    turns = itertools.takewhile(lambda turn: turn < MIN_TURNS or not was_a_storm(), itertools.count())

    async def one_client(number: int) -> None:
        nonlocal num_refused, versions
        random, labels, late = np.random.default_rng(number), Maker(), list[int]()
        async with shared.client() as own:
            for turn in turns:
                # The clients keep abreast: of a step asked about long after the others the pin would be forgotten.
                run, step = f"storm{number % 3}", turn // (4 * NUM_CLIENTS) + int(random.integers(4))
                domain = DOMAINS[int(random.integers(2))]
                asked = questions[domain]
                life = lives[-1]
                try:
                    if random.random() < 0.45:
                        group = labels.question(f"c{number}.{turn}", domain)
                        await own.publish_labels([labels.label(run, step, group), labels.label("late", turn, group)])
                        late.append(turn)
                        continue
                    if len(late) > 4:

                        async def is_consumed() -> bool:
                            """Of the queue, which keeps order, fewer are left than this client published since."""
                            return (await own.get_probe()).num_pending < 2 * 4

                        await eventually(is_consumed, "the oldest late label is consumed")
                        await own.estimate_baselines("late", late.pop(0), asked)
                    answered = await own.estimate_baselines(run, step, asked)
                except LabelsConsumedError:
                    num_refused += 1
                    continue
                except UnavailableError:  # not back in time
                    continue
                answers.extend((run, step, domain, answer.probe_version) for answer in answered)
                versions |= {answer.probe_version for answer in answered}
                if life == lives[-1]:
                    lives_told.add(life)
                    for answer, which in zip(answered, numbers(answered), strict=True):
                        told[life, run, step, answer.group_id].add(which)

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
    assert all(len(different) == 1 for different in told.values())


async def test_invalid_requests_name_their_fields_and_pin_nothing(client, make) -> None:
    with pytest.raises(PoiseClientError) as caught:
        await client.estimate_baselines("a b", 0, [make.question(""), make.question("g", "x y")])
    assert [field for field, _ in caught.value.violations] == ["run_id", "groups[0].group_id", "groups[1].domain"]
    with pytest.raises(PoiseClientError):
        await client.estimate_baselines("wrong", 0, [make.question("")])
    await client.publish_labels([make.label("wrong", 0, domain="wrong")])
    await consumed(client)
    with pytest.raises(LabelsConsumedError):
        await client.estimate_baselines("wrong", 0, [make.question()])
