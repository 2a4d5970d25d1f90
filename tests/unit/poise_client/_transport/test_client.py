import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.groups import make_group

from poise_client import AsyncGenerationClient, AsyncLearnerClient, AsyncValueClient
from poise_client._transport.client import MAX_ENTRIES, MAX_REQUEST_BYTES, pack
from poise_client.errors import InvalidRequestError
from poise_client.types import Batch, Features, Prompt, Rollout, RolloutId
from poise_proto.v1 import common_pb2, generation_pb2


def sized(num_bytes):
    return common_pb2.Tensor(data=bytes(num_bytes))


@settings(deadline=None)  # large allocations take long on a busy machine
@given(st.lists(st.integers(0, MAX_REQUEST_BYTES + 1000), max_size=12))
def test_requests_keep_order_and_stay_below_the_limit(sizes):
    messages = [sized(size) for size in sizes]
    parts = list(pack(messages))
    assert list(itertools.chain(*parts)) == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or sum(messages[i].ByteSize() for i in part) <= MAX_REQUEST_BYTES


def test_the_packed_request_stays_below_the_limit():
    specs = [generation_pb2.PromptSpec(group_id="g", text="x" * 5000) for _ in range(2000)]
    parts = list(pack(specs))
    assert len(parts) == 4
    for part in parts:
        assert (
            generation_pb2.StreamTrajectoriesRequest(prompts=[specs[i] for i in part]).ByteSize() <= MAX_REQUEST_BYTES
        )


def test_entries_are_counted_too():
    assert [len(part) for part in pack([sized(0)] * (MAX_ENTRIES + 1))] == [MAX_ENTRIES, 1]


def test_no_messages_make_no_request():
    assert list(pack([])) == []


# What cannot be sent is refused before any connection: the target is nobody.

FLAT, SQUARE = np.zeros(2, np.float32), np.zeros((2, 2), np.float32)


async def refused(awaitable):
    with pytest.raises(InvalidRequestError) as caught:
        await awaitable
    return [field for field, _ in caught.value.violations]


async def first(client, prompts, **arguments):
    return await anext(client.stream_trajectories("run", 0, prompts, **{"num_rollouts": 2} | arguments))


async def test_duplicate_group_ids_are_rejected():
    client = AsyncGenerationClient("localhost:1")
    prompts = [Prompt("a", "?"), Prompt("b", "?"), Prompt("a", "!")]
    assert await refused(first(client, prompts)) == ["prompts[2].group_id"]


async def test_a_malformed_prompt_is_rejected_by_index():
    client = AsyncGenerationClient("localhost:1")
    assert await refused(first(client, [Prompt("a", "?"), Prompt("b", [])])) == ["prompts[1].content"]


async def test_numbers_out_of_range_are_rejected():
    client = AsyncGenerationClient("localhost:1")
    assert await refused(first(client, [Prompt("a", "?")], num_rollouts=-1)) == ["request"]


async def test_malformed_features_are_rejected_by_index():
    client = AsyncValueClient("localhost:1")
    groups = [make_group("g", [Features(FLAT, FLAT)]), make_group("h", [Features(FLAT, SQUARE)])]
    assert await refused(client.estimate_baselines("run", 0, groups)) == ["groups[1].rollouts[0].response_hidden"]


async def test_a_malformed_rollout_is_rejected_by_index():
    client = AsyncLearnerClient("localhost:1")
    ids = np.zeros(2, np.int32)
    rollout = Rollout(RolloutId("run", 0, "g", 0), ids, ids, SQUARE)
    fields = await refused(client.submit_advantages(Batch("run", "b", 0, (rollout,))))
    assert fields == ["rollouts[0].logprobs"]


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
async def test_a_timeout_of_zero_or_less_is_rejected(timeout_s):
    assert await refused(AsyncValueClient("localhost:1").get_probe(timeout_s=timeout_s)) == ["timeout_s"]
    assert await refused(AsyncValueClient("localhost:1", timeout_s=timeout_s).get_probe()) == ["timeout_s"]


async def test_a_closed_client_raises():
    client = AsyncValueClient("localhost:1")
    await client.close()
    await client.close()
    with pytest.raises(RuntimeError, match=r"is closed\. Create a new one"):
        await client.get_probe()


def test_an_unknown_option_is_rejected_with_the_known_ones():
    with pytest.raises(TypeError, match="unknown option 'tokn'; use one of token, token_file"):
        AsyncValueClient("localhost:1", tokn="secret")
