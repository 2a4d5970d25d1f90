"""Score-weighted estimators over gRPC, with groups of one rollout: the order invariant, and kills."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.integration.value.service import Maker, ValueService, consumed, fitted

from poise_client.errors import LabelsConsumedError, PoiseClientError
from poise_client.types import Group, GroupBaselines

ESTIMATORS = ("score_mean", "score_prefix", "score_prompt", "auto")
"""Each is that of the domain of the same name."""


@pytest.fixture
async def service(build: Callable[..., ValueService]) -> ValueService:
    started = build(*(f"estimator_by_domain.{name}={name}" for name in ESTIMATORS))
    started.start()
    await started.ready()
    return started


def queries(make: Maker, num_groups: int = 3) -> list[Group]:
    return [make.query(f"{name}.{i}", name, n=1) for name in ESTIMATORS for i in range(num_groups)]


def numbers(answers: Sequence[GroupBaselines]) -> list[tuple[int, str, bytes]]:
    return [
        (answer.probe_version, answer.estimator, b"".join(map(bytes, answer.token_baselines or (answer.baselines,))))
        for answer in answers
    ]


async def test_groups_of_one_keep_the_order_through_a_kill(service, make) -> None:
    async with service.client() as client:
        for step in range(4):
            await client.publish_labels([make.label("past", step, query) for query in queries(make)])
        await consumed(client)
        for name in ESTIMATORS:
            await fitted(client, name, 1)
        now = queries(make)
        pinned = await client.estimate_baselines("run", 0, now, wait_for_labels_s=60)
        assert {answer.estimator for answer in pinned} >= {"score_mean", "score_prefix", "score_prompt"}
        assert all(answer.up_to_date for answer in pinned)
        version = pinned[0].probe_version
        await client.publish_labels([make.label("run", 0, now[0]), make.label("run", 1, queries(make)[0])])
        await consumed(client)
        await fitted(client, "score_mean", version + 1)

        service.kill()
        service.start()
        await service.ready()

        assert numbers(await client.estimate_baselines("run", 0, now)) == numbers(pinned)
        with pytest.raises(LabelsConsumedError, match="step 1 of run 'run'"):
            await client.estimate_baselines("run", 1, now)
        after = await client.estimate_baselines("run", 2, now)
        assert after[0].probe_version > version
        assert numbers(after)[3:] == numbers(pinned)[3:]  # the other domains learnt nothing since


async def test_the_report_names_estimators_and_errors(service, make) -> None:
    async with service.client() as client:
        for step in range(4):
            await client.publish_labels([make.label("run", step, query) for query in queries(make)])
        await client.estimate_baselines("run", 4, queries(make), wait_for_labels_s=60)
        report = await client.get_probe()
        assert (report.estimator, dict(report.domain_estimators)) == ("probe", {name: name for name in ESTIMATORS})
        status = {probe.domain: probe for probe in report.probes}
        assert [status[name].configured for name in ESTIMATORS] == [*ESTIMATORS]
        assert [each.estimator for each in status["auto"].errors] == ["score_mean", "score_prefix", "score_prompt"]
        metrics = (await service.get("/metrics")).text
        assert 'poise_value_estimator{domain="score_prefix",estimator="score_prefix"} 1.0' in metrics
        assert 'poise_value_estimator_error{domain="auto",estimator="score_prompt"}' in metrics


async def test_the_probe_rejects_labels_of_one_rollout(service, make) -> None:
    async with service.client() as client:
        with pytest.raises(PoiseClientError, match=r"rollouts_per_prompt to 2 or more, or value.estimator") as caught:
            await client.publish_labels([make.label("run", 0, make.query(n=1))])
    assert caught.value.violations[0][0] == "groups[0].rollouts"
