"""The SDK's run against servers in this process: messages of each call, and order of calls."""

import asyncio
import dataclasses

import numpy as np
import pytest

from poise_client import codec, connect, connect_async
from poise_client.errors import StepOrderError
from poise_client.types import Group, GroupBaselines, Prompt, Sampling
from poise_proto.v1 import learner_pb2, value_pb2

CONTENTS = ["1 + 1 =", "2 + 2 ="]


@pytest.fixture
async def run(target):
    async with connect_async(generation=target, value=target, learner=target) as services:
        yield services.run("run", domain="sums")


def answering(values, baselines, tokens=None):
    """Return a script entry of the value service that answers each group alike."""

    async def entry(request, context):
        answer = GroupBaselines(
            "",
            7,
            np.float32(values),
            None if baselines is None else np.float32(baselines),
            estimator="score_prefix" if tokens else "probe",
            token_baselines=tokens and tuple(map(np.float32, tokens)),
        )
        groups = [dataclasses.replace(answer, group_id=group.group_id) for group in request.groups]
        return value_pb2.EstimateBaselinesResponse(
            groups=[codec.encode(group, value_pb2.GroupBaselines) for group in groups]
        )

    return entry


async def with_critic(request, context):
    return learner_pb2.GetStatusResponse(state="LEARNER_STATE_IDLE", has_critic=True)


async def test_a_step_sends_what_the_services_need(run, value_service, learner_service):
    value_service.script = [answering([0.25, 0.75], [0.75, 0.25])]
    groups = await run.sample(3, CONTENTS, num_rollouts=2, sampling=Sampling(temperature=0.5))
    baselines = await run.baselines(groups, [[1, 0], [0, 0]])
    assert await run.publish(baselines) == 2
    result = await run.train(baselines)
    assert result.policy_version == 9
    estimated, published = (
        [codec.decode(group, Group) for group in request.groups] for request in value_service.requests
    )
    assert [group.group_id for group in groups] == ["g0", "g1"]
    assert [(group.group_id, group.domain, group.rewards.tolist()) for group in estimated] == [
        ("g0", "sums", [1, 0]),
        ("g1", "sums", [0, 0]),
    ]
    assert [(group.run_id, group.step, group.rewards.tolist()) for group in published] == [
        ("run", 3, [1, 0]),
        ("run", 3, [0, 0]),
    ]
    header, *rollouts = learner_service.requests[-1]
    assert (header.header.batch_id, header.header.temperature) == ("step-00000003", 0.5)
    assert [message.rollout.advantage for message in rollouts] == [0.25, -0.25, -0.75, -0.25]
    assert not any(message.rollout.HasField("reward") for message in rollouts)


async def test_groups_return_in_the_order_of_the_prompts(run, generation_service):
    generation_service.script = [generation_service.stream("b", "a")]
    groups = await run.sample(0, [Prompt("a", "x"), Prompt("b", "y")])
    assert [group.group_id for group in groups] == ["a", "b"]


async def test_cancelling_sample_cancels_it_in_the_service(run, generation_service):
    generation_service.script = [generation_service.stream("g0", then=generation_service.hang)]
    sampling = asyncio.create_task(run.sample(0, CONTENTS))
    await generation_service.started.wait()
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    await asyncio.wait_for(generation_service.cancelled.wait(), 20)


@pytest.mark.parametrize(
    ("bootstrap", "num_rollouts", "rewards", "expected"),
    [
        pytest.param("rloo", 2, [[1, 0], [0, 0]], [[0, 1], [0, 0]], id="siblings"),
        pytest.param("batch_mean", 2, [[1, 0], [0, 0]], [[0, 0], [0.5, 0.5]], id="other prompts"),
        pytest.param("rloo", 1, [[1], [0]], [[0], [1]], id="one rollout a prompt"),
        pytest.param("none", 1, [1, 0], [[0], [0]], id="no baseline"),
    ],
)
async def test_without_a_probe_the_bootstrap_gives_baselines(target, bootstrap, num_rollouts, rewards, expected):
    async with connect_async(generation=target, value=target, learner=target) as services:
        run = services.run("run", bootstrap=bootstrap)
        groups = await run.sample(0, CONTENTS, num_rollouts=num_rollouts)
        baselines = await run.baselines(groups, rewards)
    assert baselines.is_bootstrap
    assert [each.tolist() for each in baselines.baselines] == expected


async def test_single_rollouts_have_a_baseline_with_a_probe(run, value_service):
    value_service.script = [answering([0.25], None)]
    groups = await run.sample(0, CONTENTS, num_rollouts=1)
    baselines = await run.baselines(groups, [[1], [0]])
    assert [each.tolist() for each in baselines.baselines] == [[0], [1]]


async def test_a_critic_gets_rewards_and_no_advantages(run, learner_service):
    learner_service.script = [with_critic]
    groups = await run.sample(0, CONTENTS)
    baselines = await run.baselines(groups, [[1, 0], [0, 0]])
    await run.train(baselines)
    rollouts = [message.rollout for message in learner_service.requests[-1][1:]]
    assert [(rollout.reward, rollout.advantage) for rollout in rollouts] == [(1, 0), (0, 0), (0, 0), (0, 0)]
    with pytest.raises(ValueError, match="critic computes advantages"):
        await run.train(baselines, advantages=[[0, 0], [0, 0]])


async def test_own_advantages_replace_those_of_the_baselines(run, learner_service):
    baselines = await run.baselines(await run.sample(0, CONTENTS), [[1, 0], [0, 0]])
    await run.train(baselines, advantages=[[0.5, -0.5], [2, -2]])
    assert [message.rollout.advantage for message in learner_service.requests[-1][1:]] == [0.5, -0.5, 2, -2]
    with pytest.raises(ValueError, match="group 'g1' has 2 rollouts but 1 advantages"):
        await run.train(baselines, advantages=[[0.5, -0.5], [2]])


async def test_token_baselines_of_single_rollouts_are_trained_on(run, value_service, learner_service):
    groups = await run.sample(0, CONTENTS, num_rollouts=1)
    lengths = [group.rollouts[0].token_ids.size for group in groups]
    value_service.script = [answering([0.5], None, [np.linspace(0, 1, lengths[0])])]
    baselines = await run.baselines(groups, [1, 0])
    assert not baselines.is_bootstrap
    assert await run.publish(baselines) == 2
    await run.train(baselines)
    trained = [codec.from_tensor(message.rollout.advantages) for message in learner_service.requests[-1][1:]]
    for advantages, reward, length in zip(trained, (1, 0), lengths, strict=True):
        assert advantages == pytest.approx(reward - np.linspace(0, 1, length))
    assert not any(message.rollout.HasField("advantage") for message in learner_service.requests[-1][1:])
    own = [[2.0], [np.zeros(lengths[1] + 1)]]
    with pytest.raises(ValueError, match=rf"rollout 0 of group 'g1' has {lengths[1]} tokens but advantages of shape"):
        await run.train(baselines, advantages=own)
    await run.train(baselines, advantages=[own[0], [np.ones(lengths[1])]])
    first, second = (message.rollout for message in learner_service.requests[-1][1:])
    assert (first.advantage, codec.from_tensor(second.advantages).tolist()) == (2, [1] * lengths[1])


async def test_baselines_after_publishing_are_rejected(run, value_service):
    groups, rewards = await run.sample(4, CONTENTS), [[1, 0], [0, 0]]
    await run.publish(await run.baselines(groups, rewards))
    num_requests = len(value_service.requests)
    with pytest.raises(StepOrderError, match=r"step 4 of run 'run', so .* leak.*run.baselines before run.publish"):
        await run.baselines(groups, rewards)
    assert len(value_service.requests) == num_requests


async def test_groups_of_two_steps_are_rejected(run):
    groups = [*await run.sample(0, CONTENTS[:1]), *await run.sample(1, CONTENTS[:1])]
    with pytest.raises(StepOrderError, match=r"one step of run 'run', found .* steps \[0, 1\]"):
        await run.baselines(groups, [[1, 0], [0, 0]])


async def test_groups_of_another_run_are_rejected(run, target):
    async with connect_async(generation=target, value=target, learner=target) as services:
        groups = await services.run("other").sample(0, CONTENTS)
    with pytest.raises(StepOrderError, match="'other'"):
        await run.baselines(groups, [[1, 0], [0, 0]])


async def test_a_greedy_step_is_not_trained_on(run):
    groups = await run.sample(2, CONTENTS, sampling=Sampling(temperature=0))
    baselines = await run.baselines(groups, [[1, 0], [0, 0]])
    with pytest.raises(StepOrderError, match=r"step 2 was sampled with temperature 0.*0\.01 to 100"):
        await run.train(baselines)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        pytest.param([[1, 0]], "2 groups but rewards of 1", id="a group without"),
        pytest.param([[1, 0], [1]], r"group 'g1' has 2 rollouts but rewards of shape \(1,\)", id="too few"),
    ],
)
async def test_missing_rewards_are_rejected(run, rewards, message):
    groups = await run.sample(0, CONTENTS)
    with pytest.raises(ValueError, match=message):
        await run.baselines(groups, rewards)


async def test_the_blocking_run_does_the_same(target, learner_service):
    def loop():
        with connect(generation=target, value=target, learner=target) as services:
            run = services.run("run")
            groups = run.sample(0, CONTENTS)
            baselines = run.baselines(groups, [[1, 0], [0, 0]])
            num_published = run.publish(baselines)
            result = run.train(baselines)
            version = services.generation.get_policy().policy_version
        with pytest.raises(RuntimeError, match="is closed"):
            run.train(baselines)
        return num_published, result.policy_version, version

    assert await asyncio.to_thread(loop) == (2, 9, 3)
    assert len(learner_service.requests[-1]) == 5
