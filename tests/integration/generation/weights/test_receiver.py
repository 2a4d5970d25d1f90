"""Pushes over gRPC: served exactly and whole, or not at all."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.integration.generation.conftest import Reference, Running
from tests.integration.generation.polling import DEADLINE_S, eventually
from tests.support.pushes import push_messages, weight_arrays
from tests.support.scripted_engine import PARAMETERS, ScriptedEngine

from poise.generation.weights import capacity
from poise_client import AsyncGenerationClient, RetryPolicy, weights_digest
from poise_client.errors import BusyError, ConflictError, InvalidRequestError, UnavailableError
from poise_client.types import Group, Prompt, Sampling, WeightUpdate
from poise_proto.v1 import generation_pb2 as pb

Arrays = dict[str, np.ndarray]


async def push(client: AsyncGenerationClient, arrays: Arrays, version: int, lineage: str = "lineage") -> WeightUpdate:
    return await client.update_weights(lineage_id=lineage, policy_version=version, weights=weight_arrays(arrays))


async def sample(
    client: AsyncGenerationClient, prompts: Iterable[str] = ("new weights",), **sampling: Any
) -> list[Group]:
    groups = client.stream_trajectories(
        "run",
        0,
        [Prompt(f"g{i}", prompt) for i, prompt in enumerate(prompts)],
        num_rollouts=2,
        sampling=Sampling(**{"max_tokens": 20} | sampling),
    )
    async with aclosing(groups):
        return [group async for group in groups]


async def assert_serves(running: Running, reference: Reference, arrays: Arrays, version: int) -> None:
    """Compare served rollouts with transformers."""
    for group in await sample(running.client):
        for rollout in group.rollouts:
            assert {span.policy_version for span in rollout.version_spans} == {version}
            reference.check(arrays, group.prompt_token_ids.tolist(), rollout)


def small(value: float = 0.0) -> Arrays:
    """Return weights of the scripted engine."""
    return {name: np.full(shape, value, np.float32) for name, shape in PARAMETERS.items()}


async def test_pushed_weights_are_served_exactly(tiny: Running, reference: Reference) -> None:
    for version, seed in ((1, 1), (2, 2), (9, 3)):
        arrays = reference.changed(seed)
        update = await push(tiny.client, arrays, version)
        assert (update.policy_version, update.already_applied) == (version, False)
        assert update.receive_s > 0
        assert update.pause_s > 0
        await assert_serves(tiny, reference, arrays, version)
        policy = await tiny.client.get_policy()
        assert (policy.lineage_id, policy.policy_version) == ("lineage", version)
        assert policy.digest == weights_digest(weight_arrays(arrays))
        assert tiny.app.status()["policy_version"] == version
    assert tiny.staged() == []


async def test_repeated_push_is_already_applied(tiny: Running, reference: Reference) -> None:
    arrays = reference.changed(1)
    await push(tiny.client, arrays, 4)
    update = await push(tiny.client, dict(reversed(arrays.items())), 4)
    assert (update.policy_version, update.already_applied) == (4, True)
    await assert_serves(tiny, reference, arrays, 4)


async def test_lower_version_or_other_weights_are_a_conflict(tiny: Running, reference: Reference) -> None:
    arrays = reference.changed(1)
    await push(tiny.client, arrays, 4)
    for version, seed in ((3, 1), (4, 2), (0, 2)):
        with pytest.raises(ConflictError) as caught:
            await push(tiny.client, reference.changed(seed), version)
        assert caught.value.remedy
    await assert_serves(tiny, reference, arrays, 4)


async def test_new_lineage_starts_at_any_version(tiny: Running, reference: Reference) -> None:
    await push(tiny.client, reference.changed(1), 4)
    arrays = reference.changed(2)
    assert (await push(tiny.client, arrays, 0, "another")).policy_version == 0
    await assert_serves(tiny, reference, arrays, 0)
    assert (await tiny.client.get_policy()).lineage_id == "another"


def broken(how: str, arrays: Arrays) -> list[pb.UpdateWeightsRequest]:
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "wrong shape":
        arrays = arrays | {name: arrays[name].T.copy()}
    if how == "unknown parameter":
        arrays = arrays | {"model.layers.9.mlp.up_proj.weight": arrays[name]}
    begin, *chunks, commit = push_messages(arrays, 9, chunk_bytes=2**16)
    match how:
        case "damaged":
            middle = chunks[len(chunks) // 2].chunk
            middle.data = middle.data[:100] + bytes([middle.data[100] ^ 1]) + middle.data[101:]
        case "wrong checksum":
            begin.manifest.tensors[-1].sha256 = b"x" * 32
        case "cut off half-way":
            return [begin, *chunks[: len(chunks) // 2]]
        case "out of order":
            chunks[1], chunks[2] = chunks[2], chunks[1]
        case "too much":
            end = commit.commit.total_bytes
            chunks.append(pb.UpdateWeightsRequest(chunk=pb.WeightsChunk(offset=end, data=b"x")))
        case "too large a chunk":
            chunks[0].chunk.data = bytes(2**21 + 1)
    return [begin, *chunks, commit]


@pytest.mark.parametrize(
    "how",
    [
        "damaged",
        "wrong checksum",
        "cut off half-way",
        "wrong shape",
        "unknown parameter",
        "out of order",
        "too much",
        "too large a chunk",
    ],
)
async def test_broken_push_leaves_the_old_version_serving(tiny: Running, reference: Reference, how: str) -> None:
    old = reference.changed(1)
    await push(tiny.client, old, 5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tiny.stub.UpdateWeights(iter(broken(how, reference.changed(2))))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert tiny.staged() == []
    assert (await tiny.client.get_policy()).policy_version == 5
    await assert_serves(tiny, reference, old, 5)
    await push(tiny.client, reference.changed(2), 9)
    await assert_serves(tiny, reference, reference.changed(2), 9)


async def test_push_beyond_the_limit_is_rejected_at_once(serve: Callable[..., Any], reference: Reference) -> None:
    running = await serve(model=str(reference.folder), max_update_bytes=100_000)
    with pytest.raises(InvalidRequestError, match=r"required: at most 100000 .max_update_bytes."):
        await push(running.client, reference.changed(1), 1)
    assert running.staged() == []
    await assert_serves(running, reference, reference.original, 0)


async def test_disconnected_caller_leaves_no_files(tiny: Running, reference: Reference) -> None:
    messages = push_messages(reference.changed(1), 1, chunk_bytes=2**16)

    async def halting() -> AsyncIterator[pb.UpdateWeightsRequest]:
        for message in messages[:5]:
            yield message
        await asyncio.Event().wait()

    call = tiny.stub.UpdateWeights(halting())
    await eventually(lambda: _is(bool(tiny.staged())), "the push is being received")
    call.cancel()
    await eventually(lambda: _is(not tiny.staged()), "its file is removed")
    assert (await tiny.client.get_policy()).policy_version == 0
    await push(tiny.client, reference.changed(1), 1)
    await assert_serves(tiny, reference, reference.changed(1), 1)


async def test_second_push_at_once_waits_for_the_first(tiny: Running, reference: Reference) -> None:
    release = asyncio.Event()
    *most, commit = push_messages(reference.changed(1), 1)

    async def halting() -> AsyncIterator[pb.UpdateWeightsRequest]:
        for message in most:
            yield message
        await release.wait()
        yield commit

    first = asyncio.ensure_future(tiny.stub.UpdateWeights(halting()))
    await eventually(lambda: _is(bool(tiny.staged())), "the push is being received")
    async with AsyncGenerationClient(tiny.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(BusyError):
            await push(hasty, reference.changed(2), 2)
    second = asyncio.create_task(push(tiny.client, reference.changed(2), 2))
    release.set()
    assert (await asyncio.wait_for(first, DEADLINE_S)).policy_version == 1
    assert (await asyncio.wait_for(second, DEADLINE_S)).policy_version == 2
    await assert_serves(tiny, reference, reference.changed(2), 2)


async def test_many_pushes_at_once_end_with_the_highest(tiny: Running, reference: Reference) -> None:
    updates = await asyncio.gather(
        *(push(tiny.client, reference.changed(version), version) for version in (1, 2, 3, 3)), return_exceptions=True
    )
    assert all(isinstance(update, WeightUpdate | ConflictError) for update in updates)
    assert [update.policy_version for update in updates[2:] if isinstance(update, WeightUpdate)] == [3, 3]
    await assert_serves(tiny, reference, reference.changed(3), 3)
    assert tiny.staged() == []


async def test_push_is_applied_after_its_caller_disconnects(
    scripted: tuple[Running, ScriptedEngine],
) -> None:
    running, engine = scripted
    applying, release = asyncio.Event(), asyncio.Event()
    there: list[bool] = []

    async def hold(path: Path) -> None:
        applying.set()
        await release.wait()
        there.append(path.exists())

    engine.before_update = hold
    call = running.stub.UpdateWeights(iter(push_messages(small(), 1)))
    await asyncio.wait_for(applying.wait(), DEADLINE_S)
    call.cancel()
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(BusyError):
            await push(hasty, small(), 2)
    release.set()
    await eventually(lambda: _serves_version(running, 1), "the push is applied")
    assert there == [True]
    await eventually(lambda: _is(not running.staged()), "its file is removed")
    assert (await push(running.client, small(), 1)).already_applied


async def test_push_during_rollouts_shows_in_their_spans(tiny: Running, reference: Reference) -> None:
    deadline = time.monotonic() + DEADLINE_S
    arrays = reference.changed(1)
    for attempt in itertools.count():
        assert time.monotonic() < deadline, "no rollout was long enough to see the push"
        before, after = 2 * attempt + 1, 2 * attempt + 2
        await push(tiny.client, reference.original, before)
        streaming = asyncio.create_task(
            sample(tiny.client, [f"{attempt} {i}" for i in range(4)], max_tokens=500, seed=attempt)
        )
        while not streaming.done() and tiny.app.status()["num_running"] < 8:
            await asyncio.sleep(0.001)
        await push(tiny.client, arrays, after)
        rollouts = [rollout for group in await streaming for rollout in group.rollouts]
        for rollout in rollouts:
            ends = [0, *(span.end_token for span in rollout.version_spans)]
            assert [span.start_token for span in rollout.version_spans] == ends[:-1]
            assert ends[-1] == rollout.token_ids.size
        if any([s.policy_version for s in rollout.version_spans] == [before, after] for rollout in rollouts):
            return


async def test_ready_only_after_the_first_push(serve: Callable[..., Any], reference: Reference) -> None:
    running = await serve(model=str(reference.folder), wait_for_learner=True)
    policy = await running.client.get_policy()
    assert (policy.ready, policy.lineage_id) == (False, "")
    assert "learner" in policy.not_ready_reason
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(UnavailableError, match="waiting for a learner"):
            await sample(hasty)
    waiting = asyncio.create_task(sample(running.client))
    arrays = reference.changed(1)
    await push(running.client, arrays, 0)
    assert (await running.client.get_policy()).ready
    for group in await asyncio.wait_for(waiting, DEADLINE_S):
        reference.check(arrays, group.prompt_token_ids.tolist(), group.rollouts[0])


async def test_staging_folder_that_cannot_be_created_is_named(scripted: tuple[Running, ScriptedEngine]) -> None:
    running, _ = scripted
    running.app.config.staging_dir.write_bytes(b"not a folder")
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with pytest.raises(UnavailableError, match="cannot be stored") as caught:
            await push(hasty, small(), 1)
    assert "staging_dir" in caught.value.remedy
    running.app.config.staging_dir.unlink()
    assert (await push(running.client, small(), 1)).policy_version == 1


async def test_push_without_enough_space_is_rejected_with_its_size(
    scripted: tuple[Running, ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _ = scripted
    num_bytes = sum(array.nbytes for array in small().values())
    async with AsyncGenerationClient(running.target, retries=RetryPolicy(max_attempts=1)) as hasty:
        with monkeypatch.context() as patch:
            patch.setattr(capacity, "free_bytes", lambda _: num_bytes - 1)
            folder = running.app.config.staging_dir
            said = f"stored in {folder}: it needs {num_bytes} bytes, and {num_bytes - 1} are free"
            with pytest.raises(UnavailableError, match=said) as caught:
                await push(hasty, small(), 1)
        assert "staging_dir" in caught.value.remedy
        assert (await hasty.get_policy()).policy_version == 0
        assert (await push(hasty, small(), 1)).policy_version == 1


async def _is(condition: bool) -> bool:
    return condition


async def _serves_version(running: Running, version: int) -> bool:
    return (await running.client.get_policy()).policy_version == version
