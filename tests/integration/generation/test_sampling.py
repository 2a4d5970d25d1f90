"""Rollouts over gRPC, from a real model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from tests.integration.generation.conftest import Reference, Running
from tests.integration.generation.polling import DEADLINE_S, eventually
from tests.support.scripted_engine import ScriptedEngine

from poise_client import AsyncGenerationClient, GenerationClient, RetryPolicy
from poise_client.errors import (
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
    VersionMismatchError,
)
from poise_client.types import Group, Prompt, PromptContent, Sampling

ENDLESS = Sampling(max_tokens=500, temperature=0.0)


async def stream(client: AsyncGenerationClient, contents: Sequence[PromptContent], **options: Any) -> dict[str, Group]:
    prompts = [Prompt(f"g{i}", content) for i, content in enumerate(contents)]
    groups = client.stream_trajectories("run", 4, prompts, **{"num_rollouts": 2} | options)
    async with aclosing(groups):
        return {group.group_id: group async for group in groups}


async def is_idle(running: Running) -> bool:
    return (await running.client.get_policy()).num_running == 0


async def test_groups_arrive_whole_and_exact(tiny: Running, reference: Reference) -> None:
    prompts = ["two plus two", "x"]
    groups = await stream(tiny.client, prompts, num_rollouts=3)
    assert groups.keys() == {"g0", "g1"}
    for group_id, text in zip(("g0", "g1"), prompts, strict=True):
        group = groups[group_id]
        assert group.prompt_token_ids.size == len(text)
        assert [rollout.id.rollout_index for rollout in group.rollouts] == [0, 1, 2]
        for rollout in group.rollouts:
            assert (rollout.id.run_id, rollout.id.step, rollout.id.group_id) == ("run", 4, group_id)
            assert 1 <= rollout.token_ids.size <= 12
            reference.check(reference.original, group.prompt_token_ids.tolist(), rollout)
            mean_entropy = rollout.token_entropies.mean(dtype=float)
            assert rollout.features.output_entropy.mean == pytest.approx(mean_entropy, rel=1e-3)
            assert rollout.features.prompt_hidden.shape == (64,)
            assert [span.policy_version for span in rollout.version_spans] == [0]
        assert len({tuple(rollout.token_ids.tolist()) for rollout in group.rollouts}) == 3


async def test_text_chat_and_token_prompts_agree(tiny: Running) -> None:
    rendered = "<|user|>hi<|end|><|assistant|>"
    sampling = Sampling(seed=3)
    chat = (await stream(tiny.client, [[{"role": "user", "content": "hi"}]], sampling=sampling))["g0"]
    text = (await stream(tiny.client, [rendered], sampling=sampling))["g0"]
    tokens = (await stream(tiny.client, [chat.prompt_token_ids.tolist()], sampling=sampling))["g0"]
    for other in (text, tokens):
        np.testing.assert_array_equal(other.prompt_token_ids, chat.prompt_token_ids)
        for mine, theirs in zip(chat.rollouts, other.rollouts, strict=True):
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
            np.testing.assert_allclose(mine.features.response_hidden, theirs.features.response_hidden)


async def test_sync_client_gets_the_same_rollouts(tiny: Running) -> None:
    def ask() -> list[list[int]]:
        with GenerationClient(tiny.target) as client:
            (group,) = client.stream_trajectories(
                "run", 4, [Prompt("g0", "hi")], num_rollouts=2, sampling=Sampling(seed=1)
            )
            return [rollout.token_ids.tolist() for rollout in group.rollouts]

    there = await asyncio.to_thread(ask)
    here = await stream(tiny.client, ["hi"], sampling=Sampling(seed=1))
    assert there == [rollout.token_ids.tolist() for rollout in here["g0"].rollouts]


@pytest.mark.parametrize("how", ["cancelled", "closed", "too late", "channel closed"])
async def test_abandoned_call_frees_the_engine(tiny: Running, how: str) -> None:
    client = AsyncGenerationClient(tiny.target)
    prompts = [Prompt("quick", "a"), *(Prompt(f"g{i}", f"{i}") for i in range(40))]
    groups = client.stream_trajectories(
        "run", 0, prompts, num_rollouts=8, sampling=ENDLESS, timeout_s=0.5 if how == "too late" else None
    )
    reading = asyncio.ensure_future(anext(groups))

    async def runs() -> bool:
        return reading.done() or not await is_idle(tiny)

    if how == "too late":
        with pytest.raises(DeadlineExceededError):
            await reading
            async for _ in groups:
                pass
    else:
        await eventually(runs, "rollouts run")
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    if how == "channel closed":
        await client.close()
    await groups.aclose()
    await eventually(lambda: is_idle(tiny), "the engine is free")
    assert tiny.app.status()["num_accepted"] == 0
    assert len(await stream(tiny.client, ["after"])) == 1
    await client.close()


async def test_encodings_match_the_rollouts_of_their_prompts(tiny: Running) -> None:
    contents = ["two plus two", "x", [{"role": "user", "content": "hi"}]]
    prompts = [Prompt(f"g{i}", content) for i, content in enumerate(contents)]
    encoded = await tiny.client.encode_prompts(prompts)
    groups = await stream(tiny.client, contents)
    assert [prompt.group_id for prompt in encoded] == ["g0", "g1", "g2"]
    for prompt in encoded:
        group = groups[prompt.group_id]
        assert (prompt.num_prompt_tokens, prompt.policy_version) == (group.prompt_token_ids.size, 0)
        for rollout in group.rollouts:
            np.testing.assert_allclose(prompt.prompt_hidden, rollout.features.prompt_hidden, rtol=1e-4, atol=1e-6)


async def test_prompt_to_encode_that_is_too_long_is_named(tiny: Running) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await tiny.client.encode_prompts([Prompt("a", "x"), Prompt("b", "x" * 512)])
    ((field, _),) = caught.value.violations
    assert field == "prompts[1].prompt"


async def test_encodings_are_cancelled_paused_and_drained(
    scripted: tuple[Running, ScriptedEngine],
) -> None:
    running, engine = scripted
    release = asyncio.Event()
    engine.before_rollout = lambda request: release.wait()
    abandoned = asyncio.create_task(running.client.encode_prompts([Prompt("a", "a"), Prompt("b", "b")]))
    await eventually(lambda: _says(running, num_running=2), "prompts are encoded")
    abandoned.cancel()
    await eventually(lambda: _says(running, num_running=0), "the engine is free")
    assert engine.num_aborted == 2

    accepted = asyncio.create_task(running.client.encode_prompts([Prompt("a", "a")]))
    await eventually(lambda: _says(running, num_running=1), "a prompt is encoded")
    draining = asyncio.create_task(running.app.drain())
    await eventually(lambda: _says(running, ready=False), "it drains")
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(UnavailableError, match="shutting down"):
            await hasty.encode_prompts([Prompt("c", "c")])
    assert not draining.done()
    release.set()
    assert len(await asyncio.wait_for(accepted, DEADLINE_S)) == 1
    await asyncio.wait_for(draining, DEADLINE_S)


async def test_prompt_that_is_too_long_is_named(tiny: Running) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await stream(tiny.client, ["x", "x" * 512, "y"])
    ((field, description),) = caught.value.violations
    assert field == "prompts[1].prompt"
    assert "max_model_len is 512" in description


async def test_chat_rejected_by_the_template_is_named(tiny: Running) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompts\[0\]\.chat\.messages\[0\]\.role"):
        await stream(tiny.client, [[{"role": "", "content": "x"}]])


async def test_version_not_served_yet_is_rejected(tiny: Running, reference: Reference) -> None:
    from tests.support.pushes import weight_arrays

    with pytest.raises(VersionMismatchError, match="version 0 is served"):
        await stream(tiny.client, ["x"], min_policy_version=2)
    await tiny.client.update_weights(lineage_id="a", policy_version=2, weights=weight_arrays(reference.original))
    groups = await stream(tiny.client, ["x"], min_policy_version=2)
    assert groups["g0"].rollouts[0].version_spans[0].policy_version == 2


async def test_client_retries_after_a_full_queue(serve: Callable[..., Any]) -> None:
    engine = ScriptedEngine()
    running = await serve(engine, max_queued_rollouts=2)
    release = asyncio.Event()
    engine.before_rollout = lambda request: release.wait()
    first = asyncio.create_task(stream(running.client, ["a"]))
    await eventually(lambda: _says(running, num_running=2), "the queue is full")
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(BusyError) as caught:
            await stream(hasty, ["b"])
    assert caught.value.retry_after_s
    second = asyncio.create_task(stream(running.client, ["b"]))
    release.set()
    assert len(await asyncio.wait_for(first, DEADLINE_S)) == 1
    assert len(await asyncio.wait_for(second, DEADLINE_S)) == 1


async def test_pause_rejects_new_rollouts_and_finishes_running_ones(
    scripted: tuple[Running, ScriptedEngine],
) -> None:
    running, engine = scripted
    release = asyncio.Event()
    engine.before_rollout = lambda request: release.wait()
    accepted = asyncio.create_task(stream(running.client, ["a"]))
    await eventually(lambda: _says(running, num_running=2), "rollouts run")
    await running.app.pause()
    policy = await running.client.get_policy()
    assert not policy.ready
    assert "paused" in policy.not_ready_reason
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(UnavailableError, match="paused"):
            await stream(hasty, ["b"])
    patient = asyncio.create_task(stream(running.client, ["b"]))
    release.set()
    assert len(await asyncio.wait_for(accepted, DEADLINE_S)) == 1
    assert not patient.done()
    await running.app.resume()
    assert len(await asyncio.wait_for(patient, DEADLINE_S)) == 1


async def test_drain_finishes_accepted_rollouts(scripted: tuple[Running, ScriptedEngine]) -> None:
    running, engine = scripted
    release = asyncio.Event()
    engine.before_rollout = lambda request: release.wait()
    accepted = asyncio.create_task(stream(running.client, ["a", "b"], num_rollouts=64))  # half of them wait
    await eventually(lambda: _says(running, num_running=64), "rollouts run")
    draining = asyncio.create_task(running.app.drain())
    await eventually(lambda: _says(running, ready=False), "it drains")
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(UnavailableError, match="shutting down"):
            await stream(hasty, ["c"])
    assert not draining.done()
    release.set()
    groups = await asyncio.wait_for(accepted, DEADLINE_S)
    assert {group_id: len(group.rollouts) for group_id, group in groups.items()} == {"g0": 64, "g1": 64}
    await asyncio.wait_for(draining, DEADLINE_S)


async def _says(running: Running, **wanted: object) -> bool:
    policy = await running.client.get_policy()
    return all(getattr(policy, name) == value for name, value in wanted.items())
