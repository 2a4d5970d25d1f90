"""Requests that wait for labels, over gRPC: during kills, and answered immediately if waiting is useless."""

from __future__ import annotations

import asyncio

import pytest
from tests.integration.value.service import TIMEOUT_S, consumed, fitted

from poise_client.errors import InvalidRequestError

NUM_STEPS, GROUPS = 4, 10


def labels(make, run_id: str):
    steps = range(NUM_STEPS)
    return [make.label(run_id, step, group_id=f"g{i}", domain=run_id) for step in steps for i in range(GROUPS)]


async def known(client, domain: str) -> tuple[int, int]:
    """Return the version of a domain's probe, and the groups that it could have seen."""
    (probe,) = (await client.get_probe(domain)).probes
    return probe.probe_version, probe.num_groups


async def test_a_request_after_labels_gets_a_probe_fitted_on_them(client, make) -> None:
    await client.publish_labels(labels(make, "settles"))
    (answer,) = await client.estimate_baselines("asks", 0, [make.query("a", "settles")], wait_for_labels_s=TIMEOUT_S)
    assert answer.up_to_date
    assert await known(client, "settles") == (answer.probe_version, NUM_STEPS * GROUPS)
    (again,) = await client.estimate_baselines("asks", 0, [make.query("b", "settles")], wait_for_labels_s=TIMEOUT_S)
    assert (again.up_to_date, again.probe_version) == (True, answer.probe_version)


async def test_a_request_waiting_during_kill_9_gets_such_a_probe(shared, client, make) -> None:
    query = make.query("a", "settles.killed")
    with shared.blocked_fits():
        await client.publish_labels(labels(make, "settles.killed"))
        waiting = asyncio.create_task(shared.interrupt("wait_for_labels", 0, dies=False, wait_s=TIMEOUT_S))
        asking = asyncio.create_task(
            client.estimate_baselines("asks.killed", 0, [query], wait_for_labels_s=TIMEOUT_S, timeout_s=2 * TIMEOUT_S)
        )
        assert "wait_for_labels" in await waiting
        await consumed(client)
        assert await known(client, "settles.killed") == (0, NUM_STEPS * GROUPS)
        assert not asking.done()
        shared.kill()
    shared.start()
    (answer,) = await asking
    assert answer.up_to_date
    assert answer.probe_version > 0
    assert await known(client, "settles.killed") == (answer.probe_version, NUM_STEPS * GROUPS)


async def test_a_step_stays_up_to_date_after_kill_9(shared, client, make) -> None:
    await client.publish_labels(labels(make, "settles.parts"))
    (first,) = await client.estimate_baselines(
        "asks.parts", 0, [make.query("a", "settles.parts")], wait_for_labels_s=TIMEOUT_S
    )
    await client.publish_labels([make.label("settles.parts", NUM_STEPS, domain="settles.parts")])
    await fitted(client, "settles.parts", first.probe_version + 1)  # the pin is durable with the label
    shared.kill()
    shared.start()
    await shared.ready()
    (rest,) = await client.estimate_baselines(
        "asks.parts", 0, [make.query("b", "settles.parts")], wait_for_labels_s=TIMEOUT_S
    )
    assert (rest.up_to_date, rest.probe_version) == (True, first.probe_version)


async def test_it_does_not_wait_for_domains_of_other_runs(shared, client, make) -> None:
    await client.publish_labels(labels(make, "settles.own"))
    await client.estimate_baselines("asks.own", 0, [make.query("a", "settles.own")], wait_for_labels_s=TIMEOUT_S)
    with shared.blocked_fits():
        await client.publish_labels(labels(make, "settles.stranger"))
        await consumed(client)
        asking = client.estimate_baselines(
            "asks.own", 1, [make.query("a", "settles.own")], wait_for_labels_s=600, timeout_s=1200
        )
        (answer,) = await asyncio.wait_for(asking, TIMEOUT_S)
        assert answer.up_to_date
        (other,) = await client.estimate_baselines("asks.own", 1, [make.query("b", "settles.stranger")])
        assert (other.up_to_date, other.values) == (False, None)
    await fitted(client, "settles.stranger", 1)


async def test_while_paused_the_answer_is_immediate_but_behind(shared, client, make) -> None:
    await shared.post("pause")
    try:
        await client.publish_labels(labels(make, "settles.paused"))
        query = make.query("a", "settles.paused")
        asking = client.estimate_baselines("asks.paused", 0, [query], wait_for_labels_s=600, timeout_s=1200)
        (answer,) = await asyncio.wait_for(asking, TIMEOUT_S)
        assert (answer.up_to_date, answer.values) == (False, None)
    finally:
        await shared.post("resume")
    await fitted(client, "settles.paused", 1)


async def test_an_invalid_wait_is_rejected_by_name(client, make) -> None:
    with pytest.raises(InvalidRequestError, match="wait_for_labels_s"):
        await client.estimate_baselines("asks.wrong", 0, [make.query()], wait_for_labels_s=-1)
