"""Calls wait for services, log the wait and stop on request; prompts go to available replicas."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from poise.orchestrator.config import EndpointsConfig
from poise.orchestrator.sampling import load_balancer as dispatch
from poise.orchestrator.sampling import replicas, retry
from poise.orchestrator.sampling import service_clients as module
from poise.orchestrator.sampling.load_balancer import RejectedPrompt
from poise.orchestrator.sampling.retry import StopRequested
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.runtime.config.settings import ConfigError
from poise.runtime.network.discovery import Discovery
from poise_client.errors import (
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    PoiseClientError,
    UnavailableError,
    VersionMismatchError,
)
from poise_client.types import Features, Group, Policy, Prompt, PromptCheck, Rollout, RolloutId, Sampling

DOWN = UnavailableError("nobody answers", retryable=True)
NOTHING = np.zeros(1, np.float32)
WHOLE = Rollout(
    RolloutId("run", 0, "g0", 0), token_ids=np.array([1], np.int32), features=Features(NOTHING, NOTHING), text="x"
)
CUT_OFF = dataclasses.replace(WHOLE, finish_reason="abort")
PROMPTS = [Prompt(f"g{index}", "?") for index in range(5)]
ALL = [prompt.group_id for prompt in PROMPTS]


def policy(version: int = 10, reason: str = "") -> Policy:
    return Policy("instance", "lineage", version, b"", not reason, reason, "torch", "model", 4, 1, 64, 0)


class Script:
    """A fake client: each call returns the next of `outcomes`, and then always the last."""

    def __init__(self, target: str, outcomes: Sequence[Any], policies: Sequence[Any] = ()) -> None:
        self.target = target
        self.outcomes = list(outcomes)
        self.policies = list(policies) or [policy()]
        self.calls: list[list[str]] = []
        self.timeouts: list[float | None] = []
        self.num_asked = 0
        self.is_closed = False

    def _next(self) -> Any:
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]

    async def get_status(self, *_: Any, timeout_s: float | None = None, **__: Any) -> Any:
        self.calls.append([])
        self.timeouts.append(timeout_s)
        outcome = self._next()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def get_policy(self, **_: Any) -> Policy:
        self.num_asked += 1
        policy = self.policies.pop(0) if len(self.policies) > 1 else self.policies[0]
        if isinstance(policy, BaseException):
            raise policy
        return policy

    get_probe = publish_labels = export_model = submit_advantages = estimate_baselines = get_status

    async def stream_trajectories(
        self, run_id: str, step: int, prompts: Sequence[Prompt], **_: Any
    ) -> AsyncIterator[Group]:
        self.calls.append([prompt.group_id for prompt in prompts])
        outcome = self._next()
        if callable(outcome):
            outcome = outcome(prompts)
        for item in outcome:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def check_prompts(self, prompts: Sequence[Prompt]) -> list[PromptCheck]:
        self.calls.append([prompt.group_id for prompt in prompts])
        outcome = self._next()
        if isinstance(outcome, BaseException):
            raise outcome
        return [PromptCheck(prompt.group_id, 1, str(prompt.content)) for prompt in prompts]

    async def close(self) -> None:
        self.is_closed = True


def group(prompt: Prompt) -> Group:
    return Group(prompt.group_id, ())


def all_of(prompts: Sequence[Prompt]) -> list[Group]:
    return [group(prompt) for prompt in prompts]


Make = Callable[..., ServiceClients]


@pytest.fixture
def stopping() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, stopping: asyncio.Event) -> Make:
    """Return `ServiceClients` with fake clients and short pauses."""
    monkeypatch.setattr(retry, "RETRY_EVERY_S", 0.001)
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.0)

    def make(
        generation: Sequence[Script] = (),
        value: Script | None = None,
        learner: Script | None = None,
        found_at: str = "",
        **settings: Any,
    ) -> ServiceClients:
        clients = {script.target: script for script in (*generation, value, learner) if script}
        targets = [found_at] if found_at else [script.target for script in generation] or ["none:1"]
        endpoints = EndpointsConfig(**({"generation": targets, "value": "value:1", "learner": "learner:1"} | settings))
        for name in ("AsyncGenerationClient", "AsyncValueClient", "AsyncLearnerClient"):
            monkeypatch.setattr(module, name, lambda target, **_: clients.get(target, Script(target, [DOWN])))
        return ServiceClients(endpoints, stopping)

    return make


async def sampled(services: ServiceClients, prompts: Sequence[Prompt] = PROMPTS) -> list[str]:
    groups = services.sample("run", 0, prompts, 2, Sampling(), 0)
    return [found.group_id async for found in groups]


async def test_waiting_for_a_service_is_logged_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    learner = Script("learner:1", [DOWN, DOWN, DOWN, "status"])
    assert await make(learner=learner).learner_status() == "status"
    assert len(learner.calls) == 4
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "waiting for learner at learner:1: nobody answers; `poise up` starts the services, `poise status` shows them",
        "learner at learner:1 answers after 0 s",
    ]


async def test_waiting_is_logged_repeatedly(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_LOG_EVERY_S", 0.0)
    await make(value=Script("value:1", [DOWN, DOWN, 3])).publish_labels([])
    assert len([record for record in caplog.records if "waiting for value at value:1" in record.getMessage()]) == 2


def starting(message: str) -> UnavailableError:
    return UnavailableError(message, reason="BACKEND_DOWN", retryable=True, starting=True)


async def test_startup_stages_are_logged_without_warnings(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = [starting(f"loading weights, {second} s") for second in range(5)] + [starting("compiling, 1 s"), "status"]
    await make(learner=Script("learner:1", answers)).learner_status()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "waiting for learner at learner:1: loading weights, 0 s"),
        ("INFO", "waiting for learner at learner:1: compiling, 1 s"),
        ("INFO", "learner at learner:1 answers after 0 s"),
    ]


async def test_a_failure_during_startup_is_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = [starting("loading weights, 3 s"), DOWN, "status"]
    services = make(learner=Script("learner:1", answers))
    await services.learner_status()
    assert [record.levelname for record in caplog.records if "waiting" in record.getMessage()] == ["INFO", "WARNING"]


async def test_permanent_errors_are_raised_at_once(make: Make) -> None:
    learner = Script("learner:1", [InvalidRequestError("no")])
    with pytest.raises(InvalidRequestError):
        await make(learner=learner).learner_status()
    assert len(learner.calls) == 1


async def test_a_service_that_hangs_is_called_again(make: Make) -> None:
    hangs = DeadlineExceededError("no answer within 60 s")
    assert await make(learner=Script("learner:1", [hangs, "status"])).learner_status() == "status"
    assert len(await sampled(make([Script("a:1", [[hangs], all_of])]))) == 5


async def test_an_export_has_a_long_timeout(make: Make) -> None:
    learner = Script("learner:1", ["export"])
    assert await make(learner=learner).export_model("model") == "export"
    assert learner.timeouts == [3600.0]


async def test_waiting_for_labels_extends_the_timeout(make: Make) -> None:
    value = Script("value:1", ["answers"])
    assert await make(value=value).estimate_baselines("run", 0, [], 30) == "answers"
    assert value.timeouts == [90]


async def test_a_stop_ends_the_wait(make: Make, stopping: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_EVERY_S", 600.0)
    asking = asyncio.create_task(make(learner=Script("learner:1", [DOWN])).learner_status())
    await asyncio.sleep(0)
    stopping.set()
    with pytest.raises(StopRequested):
        await asyncio.wait_for(asking, 10)


async def test_a_stop_ends_the_wait_for_rollouts(make: Make, stopping: asyncio.Event) -> None:
    stopping.set()
    with pytest.raises(StopRequested):
        await sampled(make([Script("a:1", [[DOWN]], [DOWN])]))


async def test_a_stop_does_not_cancel_a_running_call(make: Make, stopping: asyncio.Event) -> None:
    stopping.set()
    assert await make(learner=Script("learner:1", ["status"])).learner_status() == "status"


async def test_wait_until_up_needs_all_services(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    generation, value = Script("a:1", [], [DOWN, policy()]), Script("value:1", [DOWN, "report"])
    learner = Script("learner:1", [DOWN, "status"])
    await make([generation], value, learner).wait_until_up(with_value=True)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    waited_for = [record.getMessage().split(":")[0] for record in warnings]
    assert waited_for == ["waiting for learner at learner", "waiting for generation at a", "waiting for value at value"]


async def test_wait_until_up_may_skip_the_value_service(make: Make) -> None:
    value = Script("value:1", [DOWN])
    await make([Script("a:1", [])], value, Script("learner:1", ["status"])).wait_until_up(with_value=False)
    assert not value.calls


async def test_prompts_are_balanced_and_groups_yielded_once(make: Make) -> None:
    scripts = [Script("a:1", [all_of]), Script("b:1", [all_of])]
    assert sorted(await sampled(make(scripts))) == [prompt.group_id for prompt in PROMPTS]
    assert [script.calls for script in scripts] == [[["g0", "g2", "g4"]], [["g1", "g3"]]]


async def test_a_replica_without_a_share_is_not_called(make: Make) -> None:
    idle = Script("b:1", [DOWN])
    assert await sampled(make([Script("a:1", [all_of]), idle]), PROMPTS[:1]) == ["g0"]
    assert not idle.calls


async def test_only_unfinished_prompts_are_sampled_again(make: Make) -> None:
    replica = Script("a:1", [[group(PROMPTS[3]), DOWN], all_of])
    assert sorted(await sampled(make([replica]))) == [prompt.group_id for prompt in PROMPTS]
    assert replica.calls == [["g0", "g1", "g2", "g3", "g4"], ["g0", "g1", "g2", "g4"]]


@pytest.mark.parametrize(("patience_s", "told"), [(600.0, 0), (0.0, 1)])
async def test_waiting_for_a_push_is_logged_late(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, patience_s: float, told: int
) -> None:
    monkeypatch.setattr(dispatch, "_PUSH_PATIENCE_S", patience_s)
    behind = VersionMismatchError("serves version 0, not 1")
    replica = Script("a:1", [[behind], all_of], [policy(1), policy(0), policy(0), policy(1)])
    assert len([one async for one in make([replica]).sample("run", 0, PROMPTS, 2, Sampling(), 1)]) == 5
    assert len([record for record in caplog.records if "serves version" in record.getMessage()]) == told


@pytest.mark.parametrize("error", [InvalidRequestError("too long"), KeyError("an unheard-of group")])
async def test_a_permanent_error_ends_the_sampling(make: Make, error: Exception) -> None:
    scripts = [Script("a:1", [[group(PROMPTS[0]), error]]), Script("b:1", [[DOWN]])]
    with pytest.raises(type(error)):
        await asyncio.wait_for(sampled(make(scripts)), 10)


def rejecting(*names: str, also: Sequence[tuple[str, str]] = ()) -> Callable[[Sequence[Prompt]], list[Any]]:
    """Return a fake replica that rejects requests with prompts of these names."""

    def answer(prompts: Sequence[Prompt]) -> list[Any]:
        wrong = [
            (f"prompts[{i}].text", f"no {each.group_id}") for i, each in enumerate(prompts) if each.group_id in names
        ]
        return [InvalidRequestError("wrong", violations=[*wrong, *also])] if wrong else all_of(prompts)

    return answer


async def outcome(services: ServiceClients) -> dict[str, str]:
    """Return the reason for each rejected prompt; empty for sampled ones."""
    async with asyncio.timeout(20):
        found = [each async for each in services.sample("run", 0, PROMPTS, 2, Sampling(max_tokens=8), 0)]
    assert len({each.group_id for each in found}) == len(found)
    return {each.group_id: each.reason if isinstance(each, RejectedPrompt) else "" for each in found}


@pytest.mark.parametrize("names", [["g0"], ["g1", "g4"], ["g0", "g1", "g2", "g3", "g4"]])
@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_other_prompts_of_a_rejected_request_are_sampled(make: Make, names: list[str], num_replicas: int) -> None:
    replicas = [Script(f"{name}:1", [rejecting(*names)]) for name in "ab"[:num_replicas]]
    expected = {name: f"text: no {name}" if name in names else "" for name in ALL}
    assert await outcome(make(replicas)) == expected


async def test_later_rejections_follow_in_the_next_call(make: Make) -> None:
    cut = [("", "and 2 more wrong fields")]
    replica = Script("a:1", [rejecting("g1", also=cut), rejecting("g3", also=cut), rejecting()])
    assert [name for name, reason in (await outcome(make([replica]))).items() if reason] == ["g1", "g3"]


@pytest.mark.parametrize("also", [[("sampling.top_p", "is 2")], [("run_id", "is empty")]])
async def test_other_invalid_fields_end_the_sampling(make: Make, also: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidRequestError):
        await outcome(make([Script("a:1", [rejecting("g1", also=also)])]))


@pytest.mark.parametrize("index", [0, 99])
async def test_rejection_of_no_open_prompt_ends_the_sampling(make: Make, index: int) -> None:
    error = InvalidRequestError("wrong", violations=[(f"prompts[{index}].text", "no")])
    with pytest.raises(InvalidRequestError):
        await outcome(make([Script("a:1", [[group(PROMPTS[0]), error]])]))


async def test_prompts_are_checked_in_order_by_all_replicas(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPTS_PER_CHECK", 3)
    replicas = [Script("a:1", [DOWN, []]), Script("b:1", [[]])]
    told: list[int] = []
    async with asyncio.timeout(20):
        checks = await make(replicas).check_prompts([f"p{i}" for i in range(20)], told.append)
    assert [check.problem for check in checks] == [f"p{i}" for i in range(20)]
    assert told[-1] == 20
    assert all(replica.calls for replica in replicas)


async def test_a_permanent_error_ends_the_check(make: Make) -> None:
    with pytest.raises(InvalidRequestError):
        await make([Script("a:1", [InvalidRequestError("no such call")])]).check_prompts(["p"], lambda _: None)


async def test_checking_waits_for_a_replica_until_a_stop(make: Make, stopping: asyncio.Event) -> None:
    stopping.set()
    with pytest.raises(StopRequested):
        await make([Script("a:1", [[]], [policy(reason="loads")])]).check_prompts(["p"], lambda _: None)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"endpoints\.token_file: .*absent cannot be read"):
        ServiceClients(EndpointsConfig(token_file=tmp_path / "absent"), asyncio.Event())


def test_scripted_errors_are_marked_like_the_clients() -> None:
    assert isinstance(DOWN, PoiseClientError)
    assert not VersionMismatchError("x").retryable
    assert not DeadlineExceededError("x").retryable


async def test_aborted_groups_are_sampled_again(make: Make) -> None:
    def cut_off(prompts: Sequence[Prompt]) -> list[Group]:
        return [*all_of(prompts)[1:], Group(prompts[0].group_id, (WHOLE, CUT_OFF))]

    replica = Script("a:1", [cut_off, cut_off, all_of])
    found = [one async for one in make([replica]).sample("run", 0, PROMPTS, 2, Sampling(), 0)]
    assert sorted(one.group_id for one in found) == ["g0", "g1", "g2", "g3", "g4"]
    assert all(one.rollouts == () for one in found)
    assert replica.calls == [["g0", "g1", "g2", "g3", "g4"], ["g0"], ["g0"]]


# Replicas that come and go


async def taken(
    services: ServiceClients, min_policy_version: int = 0, prompts: Sequence[Prompt] = PROMPTS
) -> list[str]:
    groups = services.sample("run", 0, prompts, 2, Sampling(max_tokens=8), min_policy_version)
    return sorted([found.group_id async for found in asyncio_limited(groups)])


async def asyncio_limited(groups: AsyncIterator[Group]) -> AsyncIterator[Group]:
    async with asyncio.timeout(20):
        async for found in groups:
            yield found


async def test_prompts_of_a_lost_replica_are_reassigned_once(make: Make) -> None:
    lost = Script("a:1", [[group(PROMPTS[0]), DOWN]], [policy(), DOWN])
    other = Script("b:1", [all_of])
    assert await taken(make([lost, other])) == ALL
    assert lost.calls == [["g0", "g2", "g4"]]
    assert other.calls == [["g1", "g3"], ["g2", "g4"]]


async def test_a_draining_replica_gets_no_new_prompts(make: Make) -> None:
    services = make([draining := Script("a:1", [all_of], [policy(), policy(10, "draining")]), Script("b:1", [all_of])])
    assert await taken(services) == ALL
    draining.outcomes = [[UnavailableError("draining", retryable=True)]]
    assert await taken(services) == ALL
    assert len(draining.calls) == 2
    assert await taken(services) == ALL
    assert len(draining.calls) == 2  # it is known by now


async def test_a_new_replica_gets_prompts_once_it_is_current(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"1.1.1.1:5"}

    async def resolve(host: str, port: int) -> set[str]:
        return found

    monkeypatch.setattr(module, "Discovery", lambda targets: Discovery(targets, resolve))
    first = Script("1.1.1.1:5", [all_of])
    late = Script("1.1.1.2:5", [all_of], [policy(0), policy(2, "catching up"), policy(2), policy(3)])
    services = make([first, late], found_at="dns:///replicas:5")
    assert await taken(services, 3) == ALL
    found.add(late.target)
    while late.num_asked < 3:  # it is asked, and given nothing
        assert await taken(services, 3) == ALL
        assert not late.calls
    while not late.calls:
        assert await taken(services, 3) == ALL
    assert late.num_asked >= 4
    found.remove(first.target)  # and the other goes
    while not first.is_closed:
        assert await taken(services, 3) == ALL
    assert services.replicas.served_tokens.keys() == {late.target}


async def test_replicas_that_are_behind_are_skipped(make: Make) -> None:
    behind = Script("a:1", [[VersionMismatchError("serves version 0")]], [policy(1), policy(0)])
    current = Script("b:1", [all_of], [policy(1)])
    services = make([behind, current])
    assert await taken(services, 1) == ALL
    assert behind.calls == [["g0", "g2", "g4"]]
    assert current.calls == [["g1", "g3"], ["g0", "g2", "g4"]]


async def test_prompts_go_to_the_least_loaded_replica(make: Make) -> None:
    long, *short = [Prompt("long", "x" * 400), *(Prompt(f"s{index}", "x" * 4) for index in range(6))]
    scripts = [Script("a:1", [all_of]), Script("b:1", [all_of])]
    await taken(make(scripts), prompts=[long, *short])
    # 100 tokens of prompt against one each, and two responses of up to eight for all.
    assert [script.calls for script in scripts] == [[["long"]], [[f"s{index}" for index in range(6)]]]


async def test_the_fastest_replica_gets_most_prompts(make: Make) -> None:
    stuck = asyncio.Event()

    class Slow(Script):
        async def stream_trajectories(self, *arguments: Any, **settings: Any) -> AsyncIterator[Group]:
            await stuck.wait()
            async for one in super().stream_trajectories(*arguments, **settings):
                yield one

    slow, fast = Slow("a:1", [all_of]), Script("b:1", [all_of])
    services = make([slow, fast], rollouts_per_replica=2)
    found = []
    async for one in services.sample("run", 0, PROMPTS, 2, Sampling(max_tokens=8), 0):
        found.append(one.group_id)
        if len(found) == 4:
            stuck.set()
    assert sorted(found) == ALL
    assert (slow.calls, fast.calls) == ([["g0"]], [["g1"], ["g2"], ["g3"], ["g4"]])


async def test_a_busy_replica_gets_prompts_after_its_retry_delay(make: Make) -> None:
    busy = Script("a:1", [[BusyError("65536 rollouts are waiting", retryable=True, retry_after_s=600.0)]])
    other = Script("b:1", [all_of])
    assert await taken(make([busy, other])) == ALL
    assert len(busy.calls) == 1


async def test_prompts_of_a_silent_replica_are_reassigned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Script):
        async def stream_trajectories(self, *arguments: Any, **settings: Any) -> AsyncIterator[Group]:
            yield group(PROMPTS[0])
            await asyncio.Event().wait()

    monkeypatch.setattr(replicas, "SILENCE_S", 0.05)
    silent = Silent("a:1", [], [policy(), DOWN])
    other = Script("b:1", [all_of])
    assert await taken(make([silent, other])) == ALL
    assert other.calls == [["g1", "g3"], ["g2", "g4"]]


async def test_closing_the_stream_cancels_calls(make: Make) -> None:
    ended = asyncio.Event()

    class Endless(Script):
        async def stream_trajectories(self, *arguments: Any, **settings: Any) -> AsyncIterator[Group]:
            try:
                yield group(PROMPTS[0])
                await asyncio.Event().wait()
            finally:
                ended.set()

    groups = make([Endless("a:1", [])]).sample("run", 0, PROMPTS, 2, Sampling(), 0)
    assert (await anext(groups)).group_id == "g0"
    await groups.aclose()
    assert ended.is_set()


async def test_an_unready_learner_is_reachable(make: Make) -> None:
    recovering = UnavailableError("the learner is recovering", reason="DRAINING", retryable=True)
    for outcome, is_reachable in (
        (DOWN, False),
        (recovering, True),
        (DeadlineExceededError("late"), True),
        ("status", True),
    ):
        learner = Script("learner:1", [outcome])
        assert await make(learner=learner).is_learner_reachable() is is_reachable
        assert len(learner.calls) == 1
