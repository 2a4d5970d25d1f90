"""Invalid requests are rejected by field before anything is computed or queued; valid ones are answered."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace

import numpy as np
import pytest
from tests.support.groups import make_group
from tests.support.memory_queue import MemoryQueue, MemoryStream
from tests.unit.value.conftest import sdk_features

import poise.value.servicer
from poise.errors import BackendDown, Draining, InvalidRequest, LabelsConsumed, NotFound, QueueFull
from poise.value.estimators.features import GroupQuery
from poise.value.estimators.probe.model import FittedProbe, PromptProbe
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.servicer import MAX_GROUPS, MAX_WAIT_S, ValueServicer
from poise.value.state import ValueState
from poise_client.codec import decode, encode, to_tensor
from poise_client.types import GroupBaselines, ProbeReport, PromptFeatures, PromptScore
from poise_proto.v1 import value_pb2 as pb


def question_message(query: GroupQuery, rewards=None) -> pb.GroupFeatures:
    group = make_group(query.group_id, sdk_features(query.features), rewards, domain=query.domain)
    return encode(group, pb.GroupFeatures)


class Call:
    """A call context with this much time left."""

    def __init__(self, left_s: float | None = None) -> None:
        self._left_s = left_s

    def time_remaining(self) -> float | None:
        return self._left_s


class Barrier:
    """A label barrier that runs a test's action and returns. It records the requests and limits."""

    def __init__(self) -> None:
        self.limits_s: list[float] = []
        self.requests: list[tuple[str, set[str]]] = []
        self.behind: frozenset[str] | None = frozenset()
        self.action: Callable[[], object] = lambda: None

    async def wait(
        self, updater: object, run_id: str, domains: Collection[str], limit_s: float
    ) -> frozenset[str] | None:
        self.limits_s.append(limit_s)
        self.requests.append((run_id, set(domains)))
        self.action()
        return self.behind


class Service:
    """A servicer with a queue in memory."""

    def __init__(self, config, make) -> None:
        self.make = make
        self.config = config
        self.state = ValueState(config)
        self.stream = MemoryStream(max_entries=config.queue.max_entries)
        self.servicer = ValueServicer(config)
        self.barrier = Barrier()
        self.servicer.open(SimpleNamespace(state=self.state, queue=MemoryQueue(self.stream, "publisher")))

    def group(self, group_id: str = "g0", **options) -> pb.GroupFeatures:
        rewards = options.pop("rewards", None)
        query = self.make.query(group_id, **options)
        return question_message(query, rewards)

    def label(self, step: int = 0, group_id: str = "g0", **options) -> pb.LabelledGroup:
        return self.make.message(self.make.label(step, group_id, **options))

    async def estimate(
        self,
        *groups: pb.GroupFeatures,
        run_id: str = "run",
        step: int = 0,
        wait_for_labels_s: float = 0.0,
        left_s: float | None = None,
    ):
        request = pb.EstimateBaselinesRequest(
            run_id=run_id, step=step, groups=groups, wait_for_labels_s=wait_for_labels_s
        )
        response = await self.servicer.EstimateBaselines(request, Call(left_s))
        return [decode(group, GroupBaselines) for group in response.groups]

    async def score(self, *prompts: pb.PromptFeatures):
        response = await self.servicer.ScorePrompts(pb.ScorePromptsRequest(prompts=prompts), None)
        return [decode(score, PromptScore) for score in response.prompts]

    async def publish(self, *groups: pb.LabelledGroup) -> int:
        return (await self.servicer.PublishLabels(pb.PublishLabelsRequest(groups=groups), None)).num_queued

    async def probe(self, domain: str = ""):
        return decode(await self.servicer.GetProbe(pb.GetProbeRequest(domain=domain), None), ProbeReport)

    def install(self, domain: str = "default", width: int = 6, reward_weight: float | None = None) -> None:
        weights = {"prompt_hidden": np.full(width, 0.1)}
        if reward_weight is not None:
            weights = {"sibling_reward": np.full(1, reward_weight)}
        prompt_only = None if reward_weight is not None else PromptProbe(np.full(width, -0.1), 0.7)
        probe = FittedProbe(weights, 0.5, prompt_only)
        self.state.install(domain, VersionedProbe(1, probe, 0, 0.0))


@pytest.fixture
def service(config, make, monkeypatch) -> Service:
    service = Service(config(), make)
    monkeypatch.setattr(poise.value.servicer, "wait_for_labels", service.barrier.wait)
    return service


async def fields_of(call) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        await call
    assert all(violation.description for violation in caught.value.violations)
    return [violation.field for violation in caught.value.violations]


def with_change(message, change: Callable[[object], object]):
    change(message)
    return message


# EstimateBaselines.


async def test_answers_keep_the_order_and_use_the_domains_probe(service) -> None:
    service.install("math")
    answers = await service.estimate(
        service.group("a", domain="math"), service.group("b", domain=""), service.group("c", domain="math", n=1)
    )
    assert [(answer.group_id, answer.probe_version) for answer in answers] == [("a", 1), ("b", 0), ("c", 1)]
    assert answers[0].baselines.tolist() == answers[0].values[::-1].tolist()
    assert answers[1].values is answers[1].baselines is answers[2].baselines is None


async def test_an_empty_domain_is_the_default_one(service) -> None:
    service.install("default")
    (answer,) = await service.estimate(service.group(domain=""))
    assert answer.probe_version == 1


async def test_all_invalid_fields_of_a_request_are_named(service) -> None:
    narrow = service.group("narrow", width=4)
    groups = [
        service.group("good"),
        service.group(""),
        service.group("g", domain="a b"),
        service.group("g", n=2),
        narrow,
        service.group("nan"),
        service.group("rich", rewards=np.float32([0, 1])),
    ]
    groups[3].ClearField("rollouts")
    groups[5].rollouts[1].prompt_hidden.CopyFrom(to_tensor(np.full(6, np.nan, np.float32)))
    assert await fields_of(service.estimate(*groups, run_id="")) == [
        "run_id",
        "groups[1].group_id",
        "groups[2].domain",
        "groups[3].rollouts",
        "groups[5].rollouts[1].prompt_hidden",
        "groups[4].rollouts",
    ]


async def test_a_rejected_request_pins_nothing(service) -> None:
    await fields_of(service.estimate(service.group("a b")))
    service.state.learn(service.make.label(0))
    with pytest.raises(LabelsConsumed):
        await service.estimate(service.group())


@pytest.mark.parametrize("number", [0, MAX_GROUPS + 1])
async def test_the_number_of_groups_is_bounded(service, number) -> None:
    for call in (
        service.estimate(*[service.group()] * number),
        service.publish(*[service.label(n=2, width=1)] * number),
    ):
        assert "groups" in await fields_of(call)


async def test_a_group_of_another_width_is_rejected_by_name(service) -> None:
    service.install(width=6)
    wide = service.group("wide", width=9)
    assert await fields_of(service.estimate(service.group(domain="new"), wide)) == ["groups[1].rollouts"]


async def test_rewards_reach_a_probe_that_needs_them(service) -> None:
    service.install(reward_weight=0.25)
    (answer,) = await service.estimate(service.group(rewards=np.float32([0, 1])))
    assert answer.values.tolist() == [0.5, 0.75]
    assert answer.baselines.tolist() == [0.75, 0.5]
    assert await fields_of(service.estimate(service.group())) == ["groups[0].rewards"]


async def test_each_group_is_answered_from_its_own_features(service) -> None:
    probe = FittedProbe({"response_hidden": np.arange(9) / 100, "entropy": np.float64([1, 2, 3]) / 100}, 0.5)
    service.state.install("wide", VersionedProbe(1, probe, 0, 0.0))
    service.install("rewarded", reward_weight=0.25)
    queries = [
        service.make.query(f"g{i}", domain=domain, n=n, width=9 if domain == "wide" else 6)
        for i, (domain, n) in enumerate([("wide", 2), ("rewarded", 3), ("wide", 1), ("none", 2), ("rewarded", 2)])
    ]
    rewards = [None, np.float32([0, 0.5, 1]), np.float32([1]), None, np.float32([1, 0])]
    answers = await service.estimate(*(question_message(each, own) for each, own in zip(queries, rewards, strict=True)))
    for number in (0, 2):
        rows = queries[number].features
        expected = 0.5 + rows.response_hidden @ np.arange(9) / 100 + rows.entropies[:, [0, 4, 8]] @ [0.01, 0.02, 0.03]
        np.testing.assert_allclose(answers[number].values, expected, atol=1e-6)
        assert 0 < expected.min() < expected.max() < 1 or len(expected) == 1
    assert answers[1].values.tolist() == [0.5, 0.625, 0.75]
    assert answers[3].values is None
    assert answers[4].values.tolist() == [0.75, 0.5]


@pytest.mark.parametrize("reward_weight", [None, 0.25])
@pytest.mark.parametrize(
    "rewards", [[0.5], [0.5] * 3, [0.5, float("nan")], [float("inf"), 0], [0.5, -0.01], [1.01, 0.5], np.zeros((2, 1))]
)
async def test_invalid_rewards_are_rejected_even_if_unused(service, rewards, reward_weight) -> None:
    service.install(reward_weight=reward_weight)
    group = service.group()
    group.rewards.CopyFrom(to_tensor(np.array(rewards, np.float32)))
    assert await fields_of(service.estimate(service.group(rewards=np.float32([0, 1])), group)) == ["groups[1].rewards"]


async def test_a_request_that_pins_a_step_waits_for_labels(service) -> None:
    service.barrier.action = service.install
    (answer,) = await service.estimate(service.group(), wait_for_labels_s=30)
    assert (answer.probe_version, answer.up_to_date) == (1, True)
    service.barrier.behind = None
    (answer,) = await service.estimate(service.group(), step=1, wait_for_labels_s=30)
    assert not answer.up_to_date
    assert service.barrier.limits_s == [30, 30]


async def test_each_domain_reports_whether_it_is_up_to_date(service) -> None:
    service.barrier.behind = frozenset({"code", "chess"})
    answers = await service.estimate(
        *(service.group(domain=domain) for domain in ("math", "code", "", "math")), run_id="asks", wait_for_labels_s=30
    )
    assert [answer.up_to_date for answer in answers] == [True, False, True, True]
    assert service.barrier.requests == [("asks", {"math", "code", "default"})]
    service.barrier.behind = frozenset()
    later = await service.estimate(
        *(service.group(domain=domain) for domain in ("chess", "math")), run_id="asks", wait_for_labels_s=30
    )
    assert [answer.up_to_date for answer in later] == [False, True]


async def test_a_request_without_wait_for_labels_s_does_not_wait(service) -> None:
    (answer,) = await service.estimate(service.group())
    assert not answer.up_to_date
    assert service.barrier.limits_s == []


async def test_a_pinned_step_is_answered_without_waiting(service) -> None:
    for step, wait_for_labels_s in enumerate([30, 0]):
        await service.estimate(service.group(), step=step, wait_for_labels_s=wait_for_labels_s)
    for step, settled in enumerate([True, False]):
        (answer,) = await service.estimate(service.group("another"), step=step, wait_for_labels_s=30)
        assert answer.up_to_date is settled
    assert service.barrier.limits_s == [30]


async def test_a_step_with_consumed_labels_is_rejected_without_wait(service) -> None:
    service.state.learn(service.make.label(0))
    with pytest.raises(LabelsConsumed):
        await service.estimate(service.group(), wait_for_labels_s=30)
    assert service.barrier.limits_s == []


async def test_labels_of_the_step_during_the_wait_reject_the_request(service) -> None:
    service.barrier.action = lambda: service.state.learn(service.make.label(0))
    with pytest.raises(LabelsConsumed):
        await service.estimate(service.group(), wait_for_labels_s=30)


async def test_waiting_leaves_time_for_the_answer_before_the_deadline(service) -> None:
    await service.estimate(service.group(), wait_for_labels_s=30, left_s=10)
    await service.estimate(service.group(), step=1, wait_for_labels_s=30, left_s=100)
    assert service.barrier.limits_s == [pytest.approx(9), 30]


async def test_a_request_that_waits_during_shutdown_pins_nothing(service) -> None:
    service.barrier.action = service.servicer.close
    with pytest.raises(Draining):
        await service.estimate(service.group(), wait_for_labels_s=30)
    assert service.state.would_pin("run", 0)


@pytest.mark.parametrize("wait_for_labels_s", [-0.1, float("nan"), float("inf"), MAX_WAIT_S + 1])
async def test_an_invalid_wait_is_rejected_by_name(service, wait_for_labels_s) -> None:
    assert await fields_of(service.estimate(service.group(), wait_for_labels_s=wait_for_labels_s)) == [
        "wait_for_labels_s"
    ]
    assert service.barrier.limits_s == []


# ScorePrompts.


def prompt_message(group_id: str = "p", domain: str = "default", width: int = 6) -> pb.PromptFeatures:
    return encode(PromptFeatures(group_id, domain, np.full(width, 0.5, np.float32)), pb.PromptFeatures)


async def test_prompts_are_scored_in_request_order(service) -> None:
    service.install("math")
    service.install("default", width=4)
    scores = await service.score(
        prompt_message("a", "math"), prompt_message("b", "", width=4), prompt_message("c", "unknown")
    )
    assert [(score.group_id, score.probe_version) for score in scores] == [("a", 1), ("b", 1), ("c", 0)]
    assert [score.value for score in scores] == [pytest.approx(0.4), pytest.approx(0.5), None]


async def test_all_invalid_fields_of_prompts_are_named(service) -> None:
    service.install()
    prompts = [prompt_message(), *(prompt_message() for _ in range(5))]
    prompts[1].group_id = "a b"
    prompts[2].domain = "mäth"
    prompts[3].ClearField("prompt_hidden")
    prompts[4].prompt_hidden.CopyFrom(to_tensor(np.float32([1, np.inf])))
    prompts[5].prompt_hidden.CopyFrom(to_tensor(np.zeros(0, np.float32)))
    assert await fields_of(service.score(*prompts)) == [
        "prompts[1].group_id",
        "prompts[2].domain",
        "prompts[3].prompt_hidden",
        "prompts[4].prompt_hidden",
        "prompts[5].prompt_hidden",
    ]
    assert await fields_of(service.score(prompt_message(), prompt_message(width=9))) == ["prompts[1].prompt_hidden"]


@pytest.mark.parametrize("number", [0, MAX_GROUPS + 1])
async def test_the_number_of_prompts_is_bounded(service, number) -> None:
    assert await fields_of(service.score(*[prompt_message(width=1)] * number)) == ["prompts"]


# PublishLabels.


async def test_labels_are_queued_unchanged_in_order(service) -> None:
    labels = [service.label(0, "a"), service.label(1, "b")]
    assert await service.publish(*labels) == 2
    assert [pb.LabelledGroup.FromString(entry.payload) for entry in service.stream.unread] == labels


async def test_all_invalid_fields_of_labels_are_named(service) -> None:
    service.state.learn(service.make.label(0, domain="known", width=9))
    service.install("known", width=9)
    labels = [
        service.label(),
        with_change(service.label(), lambda label: label.ClearField("schema_version")),
        with_change(service.label(), lambda label: label.ClearField("run_id")),
        with_change(service.label(), lambda label: label.rewards.CopyFrom(to_tensor(np.zeros(3, np.float32)))),
        service.label(domain="known"),
        service.label(width=4),
    ]
    assert await fields_of(service.publish(*labels)) == [
        "groups[1].schema_version",
        "groups[2].run_id",
        "groups[3].rewards",
        "groups[4].rollouts",
        "groups[5].rollouts",
    ]
    assert not service.stream.unread


async def test_a_domain_over_the_limit_is_rejected_by_name(config, make) -> None:
    service = Service(config(probe={"max_domains": 1}), make)
    service.state.learn(make.label(0, domain="one"))
    assert await fields_of(service.publish(service.label(domain="two"))) == ["groups[0].domain"]


async def test_a_label_larger_than_the_limit_is_rejected_by_name(config, make) -> None:
    service = Service(config(queue={"max_entry_bytes": 1024}), make)
    labels = [service.label(), service.label(0, "large", domain="large", width=200)]
    assert await fields_of(service.publish(*labels)) == ["groups[1]"]
    assert not service.stream.unread


async def test_more_labels_than_the_queue_can_hold_are_invalid(config, make) -> None:
    service = Service(config(queue={"max_entries": 2}), make)
    assert await fields_of(service.publish(*[service.label(0, str(i)) for i in range(3)])) == ["groups"]


async def test_a_full_queue_accepts_all_of_a_request_or_nothing(config, make) -> None:
    service = Service(config(queue={"max_entries": 3}), make)
    await service.publish(service.label(0, "a"), service.label(0, "b"))
    with pytest.raises(QueueFull) as caught:
        await service.publish(service.label(0, "c"), service.label(0, "d"))
    assert caught.value.retry_after_s
    assert len(service.stream.unread) == 2


# GetProbe.


async def test_the_report_counts_consumed_and_queued_groups(service) -> None:
    for step in range(2):
        service.state.learn(service.make.label(step, domain="math"))
    service.state.learn(service.make.label(1, domain="math"))
    service.state.learn(service.make.label(0, "x", domain="code", n=3))
    service.install("math")
    await service.publish(service.label(5))
    report = await service.probe()
    assert [(each.domain, each.probe_version, each.num_groups, each.num_rows) for each in report.probes] == [
        ("code", 0, 1, 3),
        ("math", 1, 2, 4),
    ]
    assert [(each.num_steps_seen, each.warmup_steps) for each in report.probes] == [(1, 2), (2, 2)]
    assert (report.num_groups_consumed, report.num_duplicates, report.num_pending) == (3, 1, 1)


async def test_get_probe_of_one_domain_or_an_unknown_one(service) -> None:
    for domain in ("math", "code"):
        service.state.learn(service.make.label(0, domain, domain=domain))
    assert [each.domain for each in (await service.probe("code")).probes] == ["code"]
    with pytest.raises(NotFound, match=r"'chess'.*domains with labels: code, math"):
        await service.probe("chess")


# Before and after.


async def all_calls(service: Service, error: type[Exception]) -> None:
    calls = service.estimate(service.group()), service.score(prompt_message()), service.publish(service.label())
    for call in (*calls, service.probe()):
        with pytest.raises(error):
            await call


async def test_requests_before_the_restore_are_rejected(config) -> None:
    servicer = ValueServicer(config())
    for call in (servicer.EstimateBaselines, servicer.ScorePrompts, servicer.PublishLabels, servicer.GetProbe):
        with pytest.raises(BackendDown, match="restoring"):
            await call(None, None)


async def test_requests_after_closing_are_rejected(service) -> None:
    service.servicer.close()
    await all_calls(service, Draining)
    assert not service.stream.unread
