"""Limits, seeds and order of rollouts, and that every end of a request frees what it held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import numpy as np
import pytest
from tests.support.scripted_engine import ScriptedEngine

from poise.errors import Busy, InvalidRequest
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineRequest
from poise.generation.sampler import Sampler, rollout_seed
from poise_client.types import EncodedPrompt, Group, Prompt, PromptContent, Sampling

Build = Callable[..., GenerationConfig]


def start(
    sampler: Sampler,
    contents: Sequence[PromptContent],
    num_rollouts: int = 2,
    sampling: Sampling | None = None,
) -> AsyncGenerator[Group, None]:
    prompts = [Prompt(f"g{i}", content) for i, content in enumerate(contents)]
    return sampler.sample("run", 3, prompts, num_rollouts, sampling or Sampling())


async def all_groups(groups: AsyncGenerator[Group, None]) -> dict[str, Group]:
    return {group.group_id: group async for group in groups}


class Gate:
    """Delays the rollouts of a prompt until it is opened."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def open(self, content: str) -> None:
        self._events.setdefault(content, asyncio.Event()).set()

    async def __call__(self, request: EngineRequest) -> None:
        await self._events.setdefault(bytes(request.prompt_token_ids).decode(), asyncio.Event()).wait()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


async def assert_all_freed(sampler: Sampler, engine: ScriptedEngine, max_num_seqs: int) -> None:
    """Check that nothing is left, and that as many rollouts as ever can run at once."""
    assert sampler.num_accepted == sampler.num_running == 0
    await asyncio.wait_for(sampler.wait_until_idle(), 1)
    engine.before_rollout = lambda request: asyncio.sleep(0.001)
    engine.most_at_once = 0
    await all_groups(start(sampler, ["a"], num_rollouts=max_num_seqs))
    assert engine.most_at_once == max_num_seqs


@pytest.mark.parametrize("limit", [1, 3])
async def test_rollouts_at_once_are_limited(engine: ScriptedEngine, config: Build, limit: int) -> None:
    sampler = Sampler(engine, config(max_num_seqs=limit))
    running: list[int] = []

    async def note(request: EngineRequest) -> None:
        running.append(sampler.num_running)
        await asyncio.sleep(0)

    engine.before_rollout = note
    groups = await all_groups(start(sampler, ["a", "b", "c", "d"], num_rollouts=3))
    assert len(groups) == 4
    assert engine.most_at_once == max(running) == limit
    await assert_all_freed(sampler, engine, limit)


async def test_requests_share_the_limit(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    sampler = Sampler(engine, config(max_num_seqs=3))
    both = [asyncio.create_task(all_groups(start(sampler, [content], num_rollouts=2))) for content in ("a", "b")]
    await settle()
    assert (sampler.num_running, sampler.num_accepted) == (3, 4)
    gate.open("a")
    gate.open("b")
    await asyncio.gather(*both)
    assert engine.most_at_once == 3
    await assert_all_freed(sampler, engine, 3)


async def test_groups_come_in_order_of_finishing(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    sampler = Sampler(engine, config(max_num_seqs=6))
    groups = start(sampler, ["a", "b", "c"])
    seen = []
    for content in ("b", "c", "a"):
        gate.open(content)
        seen.append((await anext(groups)).group_id)
    assert seen == ["g1", "g2", "g0"]
    with pytest.raises(StopAsyncIteration):
        await anext(groups)


def encode(sampler: Sampler, contents: Sequence[PromptContent]) -> AsyncGenerator[EncodedPrompt, None]:
    return sampler.encode([Prompt(f"g{i}", content) for i, content in enumerate(contents)])


async def test_prompts_are_encoded_as_their_rollouts_would_be(engine: ScriptedEngine, config: Build) -> None:
    sampler = Sampler(engine, config())
    encoded = [prompt async for prompt in encode(sampler, ["hi", [1, 2, 3]])]
    assert [(p.group_id, p.num_prompt_tokens, p.policy_version) for p in encoded] == [("g0", 2, 0), ("g1", 3, 0)]
    groups = await all_groups(start(sampler, ["hi", [1, 2, 3]]))
    for prompt in encoded:
        for rollout in groups[prompt.group_id].rollouts:
            np.testing.assert_array_equal(prompt.prompt_hidden, rollout.features.prompt_hidden)


async def test_encoding_shares_the_limits_of_rollouts(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    sampler = Sampler(engine, config(max_num_seqs=3, max_queued_rollouts=5))
    rollouts = asyncio.create_task(all_groups(start(sampler, ["a"], num_rollouts=2)))
    await settle()
    prompts = encode(sampler, ["b", "c", "d"])
    first = asyncio.ensure_future(anext(prompts))
    await settle()
    assert (sampler.num_running, sampler.num_accepted) == (3, 5)
    with pytest.raises(Busy, match="exceed max_queued_rollouts, 5"):
        await anext(encode(sampler, ["e"]))
    with pytest.raises(InvalidRequest, match="max_queued_rollouts is 5"):
        await anext(encode(sampler, ["e"] * 6))
    idle = asyncio.ensure_future(sampler.wait_until_idle())
    gate.open("a")
    await rollouts
    assert not idle.done()
    for content in "bcd":
        gate.open(content)
    assert {(await first).group_id} | {prompt.group_id async for prompt in prompts} == {"g0", "g1", "g2"}
    await idle
    await assert_all_freed(sampler, engine, 3)


async def test_closing_aborts_running_encodings(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    sampler = Sampler(engine, config(max_num_seqs=3))
    gate.open("a")
    async with aclosing(encode(sampler, "abcd")) as prompts:
        assert (await anext(prompts)).group_id == "g0"
        await settle()
    assert engine.num_aborted == 3
    await assert_all_freed(sampler, engine, 3)


@pytest.mark.parametrize(
    ("content", "field"), [("", "text"), ([256], "tokens.token_ids"), ([1] * 64, "prompt"), ("x" * 64, "prompt")]
)
async def test_prompts_that_cannot_be_sampled_are_not_encoded(
    engine: ScriptedEngine, config: Build, content: PromptContent, field: str
) -> None:
    sampler = Sampler(engine, config())
    with pytest.raises(InvalidRequest, match=rf"^prompts\[1\]\.{field}: "):
        await anext(encode(sampler, ["x" * 63, content]))
    await assert_all_freed(sampler, engine, config().max_num_seqs)


async def test_group_holds_its_prompt_and_its_rollouts_in_order(engine: ScriptedEngine, config: Build) -> None:
    first_done = asyncio.Event()

    async def last_first(request: EngineRequest) -> None:
        if request.id.rollout_index == 0:
            await first_done.wait()
        first_done.set()

    engine.before_rollout = last_first
    sampler = Sampler(engine, config())
    (group,) = (await all_groups(start(sampler, ["hi"], sampling=Sampling(seed=1)))).values()
    np.testing.assert_array_equal(group.prompt_token_ids, [104, 105])
    assert [rollout.id.rollout_index for rollout in group.rollouts] == [0, 1]
    assert {(r.id.run_id, r.id.step, r.id.group_id) for r in group.rollouts} == {("run", 3, "g0")}
    assert [r.sampling.seed for r in engine.requests] == [rollout_seed(1, "g0", 0), rollout_seed(1, "g0", 1)]
    for rollout in group.rollouts:
        assert rollout.token_entropies.size == rollout.sum_squared_probs.size == rollout.token_ids.size


async def test_closing_aborts_running_and_waiting_rollouts(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    gate.open("a")
    sampler = Sampler(engine, config(max_num_seqs=3))
    groups = start(sampler, ["a", "b", "c"])
    await anext(groups)
    await settle()
    await groups.aclose()
    assert engine.num_aborted == 3
    await assert_all_freed(sampler, engine, 3)


async def test_cancelling_twice_aborts_everything(engine: ScriptedEngine, config: Build) -> None:
    async def slow_to_abort(request: EngineRequest) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    engine.before_rollout = slow_to_abort
    sampler = Sampler(engine, config())
    task = asyncio.create_task(all_groups(start(sampler, ["a", "b"])))
    await settle()
    assert sampler.num_running == 4
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()
    await assert_all_freed(sampler, engine, 4)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
async def test_failing_rollout_aborts_the_rest(engine: ScriptedEngine, config: Build, max_num_seqs: int) -> None:
    async def fail_one(request: EngineRequest) -> None:
        if bytes(request.prompt_token_ids) == b"b":
            await asyncio.sleep(0)
            raise RuntimeError("out of luck")
        if max_num_seqs > 2:
            await asyncio.Event().wait()

    engine.before_rollout = fail_one
    sampler = Sampler(engine, config(max_num_seqs=max_num_seqs))
    with pytest.raises(RuntimeError, match="out of luck"):
        await all_groups(start(sampler, ["a", "b", "c"]))
    await assert_all_freed(sampler, engine, max_num_seqs)
    engine.before_rollout = ScriptedEngine().before_rollout
    assert len(await all_groups(start(sampler, ["a", "b", "c"]))) == 3


async def test_failing_rollout_aborts_its_siblings(engine: ScriptedEngine, config: Build) -> None:
    async def fail_first(request: EngineRequest) -> None:
        if request.id.rollout_index == 0:
            raise RuntimeError("out of luck")
        await asyncio.Event().wait()

    engine.before_rollout = fail_first
    sampler = Sampler(engine, config())
    with pytest.raises(RuntimeError, match="out of luck"):
        await all_groups(start(sampler, ["a"], num_rollouts=4))
    assert engine.num_aborted == 3
    await assert_all_freed(sampler, engine, 4)


async def test_request_beyond_the_queue_is_busy(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    gate.open("b")
    sampler = Sampler(engine, config(max_num_seqs=8, max_queued_rollouts=8))
    waiting = asyncio.create_task(all_groups(start(sampler, ["a"], num_rollouts=7)))
    await settle()
    with pytest.raises(Busy, match="7 rollouts are waiting and 2 more exceed max_queued_rollouts, 8") as caught:
        await all_groups(start(sampler, ["b"], num_rollouts=2))
    assert caught.value.retry_after_s
    assert sampler.num_accepted == 7
    assert len(await all_groups(start(sampler, ["b"], num_rollouts=1))) == 1
    gate.open("a")
    await waiting
    await assert_all_freed(sampler, engine, 8)


async def test_yielded_groups_free_the_queue(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    gate.open("a")
    sampler = Sampler(engine, config(max_queued_rollouts=4))
    groups = start(sampler, ["a", "b"])
    await anext(groups)
    assert sampler.num_accepted == 4  # the caller may not have taken it yet
    waiting = asyncio.create_task(anext(groups))
    await settle()
    assert sampler.num_accepted == 2
    assert len(await all_groups(start(sampler, ["a"]))) == 1
    gate.open("b")
    await waiting
    await groups.aclose()
    await assert_all_freed(sampler, engine, 4)


async def test_request_larger_than_the_queue_is_invalid(engine: ScriptedEngine, config: Build) -> None:
    sampler = Sampler(engine, config(max_queued_rollouts=8))
    with pytest.raises(InvalidRequest, match="prompts: need 9 rollouts; max_queued_rollouts is 8"):
        await all_groups(start(sampler, ["a", "b", "c"], num_rollouts=3))
    assert len(await all_groups(start(sampler, ["a", "b"], num_rollouts=4))) == 2


async def test_idle_waits_for_the_last_rollout(engine: ScriptedEngine, config: Build) -> None:
    gate = engine.before_rollout = Gate()
    sampler = Sampler(engine, config())
    await asyncio.wait_for(sampler.wait_until_idle(), 10)
    groups = asyncio.create_task(all_groups(start(sampler, ["a", "b"])))
    await settle()
    idle = asyncio.create_task(sampler.wait_until_idle())
    gate.open("a")
    await settle()
    assert not idle.done()
    gate.open("b")
    await asyncio.wait_for(idle, 10)
    await groups


async def sampled(engine: ScriptedEngine, config: GenerationConfig, contents: dict[str, str], seed: int | None) -> dict:
    """Return the tokens of every rollout by group and index."""
    prompts = [Prompt(group_id, content) for group_id, content in contents.items()]
    groups = Sampler(engine, config).sample("run", 0, prompts, 3, Sampling(seed=seed))
    async with aclosing(groups):
        return {(g.group_id, r.id.rollout_index): r.token_ids.tolist() async for g in groups for r in g.rollouts}


async def test_seeded_rollouts_do_not_depend_on_order_or_others(engine: ScriptedEngine, config: Build) -> None:
    contents = {"g0": "x", "g1": "x", "g2": "y"}
    together = await sampled(engine, config(max_num_seqs=1), contents, 5)
    reordered = await sampled(engine, config(max_num_seqs=9), dict(reversed(contents.items())), 5)
    alone = await sampled(engine, config(), {"g1": "x"}, 5)
    assert together == reordered
    assert alone == {key: tokens for key, tokens in together.items() if key[0] == "g1"}
    assert len({tuple(tokens) for tokens in together.values()}) == 9
    assert await sampled(engine, config(), contents, 6) != together


async def test_rollouts_without_a_seed_get_none(engine: ScriptedEngine, config: Build) -> None:
    await sampled(engine, config(), {"g0": "x"}, None)
    assert {request.sampling.seed for request in engine.requests} == {None}


def test_seeds_differ_between_siblings_groups_and_requests() -> None:
    seeds = {rollout_seed(s, g, i) for s in (0, 1, 2**64 - 1) for g in ("a", "b", "1/a") for i in range(4)}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("requested", "num_prompt_tokens", "expected"),
    [(0, 10, 8), (5, 10, 5), (500, 10, 54), (0, 60, 4), (500, 63, 1)],
)
async def test_response_length_is_limited_by_default_request_or_model(
    engine: ScriptedEngine, config: Build, requested: int, num_prompt_tokens: int, expected: int
) -> None:
    sampling = Sampling(max_tokens=requested)
    await all_groups(start(Sampler(engine, config()), ["x" * num_prompt_tokens], 1, sampling))
    assert engine.requests[0].sampling.max_tokens == expected


async def test_prompts_that_are_too_long_are_all_named(engine: ScriptedEngine, config: Build) -> None:
    sampler = Sampler(engine, config())
    contents: list[PromptContent] = ["x" * 64, "fine", [65] * 70, "x" * 63]
    with pytest.raises(InvalidRequest) as caught:
        await all_groups(start(sampler, contents))
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert found.keys() == {"prompts[0].prompt", "prompts[2].prompt"}
    assert "has 64 tokens; required: at most 63" in found["prompts[0].prompt"]
    assert "has 70 tokens; required: at most 63" in found["prompts[2].prompt"]
    assert engine.requests == []
    await assert_all_freed(sampler, engine, 4)


@pytest.mark.parametrize(
    ("content", "field"),
    [("", "prompts[0].text"), ([0, 256], "prompts[0].tokens.token_ids"), ([2**32 - 1], "prompts[0].tokens.token_ids")],
)
async def test_wrong_prompt_is_named(engine: ScriptedEngine, config: Build, content: PromptContent, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await all_groups(start(Sampler(engine, config()), [content]))
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_text_chat_and_tokens_reach_the_engine(engine: ScriptedEngine, config: Build) -> None:
    contents: list[PromptContent] = ["hi", [{"role": "user", "content": "hi"}], [0, 255]]
    groups = await all_groups(start(Sampler(engine, config()), contents, 1))
    assert groups["g0"].prompt_token_ids.tolist() == [104, 105]
    assert groups["g1"].prompt_token_ids.tolist() == list(b"<user>hi<assistant>")
    assert groups["g2"].prompt_token_ids.tolist() == [0, 255]
