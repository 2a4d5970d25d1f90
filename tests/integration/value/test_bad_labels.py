"""Labels that are wrong in every way come by both doors: each is refused by name or dead-lettered, never learnt."""

from __future__ import annotations

import grpc.aio
import numpy as np
import redis.asyncio
from tests.integration.value.service import Maker, ValueService, consumed, fitted, warm_up

from poise_client import AsyncValueClient
from poise_client.codec import encode_labelled_group, to_tensor
from poise_client.errors import InvalidRequestError, PoiseClientError
from poise_proto.v1 import value_pb2 as pb
from poise_proto.v1 import value_pb2_grpc

NUM_BAD, SEED = 240, 7
Random = np.random.Generator


def nan_in_features(label: pb.LabelledGroup, random: Random) -> None:
    broken = np.full(8, random.choice([np.nan, np.inf, -np.inf]), np.float32)
    label.rollouts[0].response_hidden.CopyFrom(to_tensor(broken))


def nan_reward(label: pb.LabelledGroup, random: Random) -> None:
    label.rewards.CopyFrom(to_tensor(np.array([np.nan, 0.5], np.float32)))


def reward_out_of_range(label: pb.LabelledGroup, random: Random) -> None:
    label.rewards.CopyFrom(to_tensor(np.array([0.5, random.choice([-0.1, 1.5, 1e30])], np.float32)))


def reward_missing(label: pb.LabelledGroup, random: Random) -> None:
    label.rewards.CopyFrom(to_tensor(np.array([0.5], np.float32)))


def unknown_schema(label: pb.LabelledGroup, random: Random) -> None:
    label.schema_version = int(random.choice([0, 1, 4_000_000_000]))


def half_a_group(label: pb.LabelledGroup, random: Random) -> None:
    """As many rollouts as a group needs, and a reward each: but twice as many were sampled."""
    label.num_rollouts = 2 * len(label.rollouts)


def a_group_of_one(label: pb.LabelledGroup, random: Random) -> None:
    del label.rollouts[1]
    label.num_rollouts = 1
    label.rewards.CopyFrom(to_tensor(np.array([0.5], np.float32)))


def another_width(label: pb.LabelledGroup, random: Random) -> None:
    for rollout in label.rollouts:
        for tensor in (rollout.prompt_hidden, rollout.response_hidden):
            tensor.CopyFrom(to_tensor(np.zeros(5, np.float32)))


def widths_that_differ(label: pb.LabelledGroup, random: Random) -> None:
    label.rollouts[1].prompt_hidden.CopyFrom(to_tensor(np.zeros(9, np.float32)))


def bytes_that_do_not_fit_the_shape(label: pb.LabelledGroup, random: Random) -> None:
    label.rollouts[0].prompt_hidden.data += b"\0"


def no_run(label: pb.LabelledGroup, random: Random) -> None:
    label.run_id = str(random.choice(["", "a b", "x" * 200, "../etc"]))


def no_group(label: pb.LabelledGroup, random: Random) -> None:
    label.group_id = ""


def domain_of_no_name(label: pb.LabelledGroup, random: Random) -> None:
    label.domain = "x\ny"


def entropy_not_a_number(label: pb.LabelledGroup, random: Random) -> None:
    label.rollouts[1].output_entropy.max = float("nan")


CHANGES = (
    nan_in_features,
    nan_reward,
    reward_out_of_range,
    reward_missing,
    unknown_schema,
    half_a_group,
    a_group_of_one,
    another_width,
    widths_that_differ,
    bytes_that_do_not_fit_the_shape,
    no_run,
    no_group,
    domain_of_no_name,
    entropy_not_a_number,
)
"""What makes a right label poison, whatever else is in it."""


def damaged(payload: bytes, random: Random) -> bytes:
    """Cut off, flipped bits, or nothing but noise: what comes of it is anybody's guess."""
    kind = random.integers(3)
    if kind == 0:
        return payload[: int(random.integers(len(payload)))]
    if kind == 1:
        noisy = np.frombuffer(payload, np.uint8).copy()
        places = random.integers(noisy.size, size=int(random.integers(1, 9)))
        noisy[places] ^= random.integers(1, 256, size=places.size).astype(np.uint8)
        return noisy.tobytes()
    return random.bytes(int(random.integers(0, 300)))


async def test_bad_labels_never_stop_the_good_ones_and_all_are_accounted_for(
    shared: ValueService, client: AsyncValueClient, make: Maker, valkey_url: str
) -> None:
    random = np.random.default_rng(SEED)
    await warm_up(client, make, "fuzz")
    before = await client.get_probe()
    num_good = num_dead = num_guesses = num_again = 0
    async with (
        redis.asyncio.from_url(valkey_url) as server,
        grpc.aio.insecure_channel(shared.grpc) as channel,
    ):
        door = value_pb2_grpc.ValueServiceStub(channel)

        async def enqueue(payload: bytes) -> None:
            await server.xadd(shared.folder.name, {"group": payload})

        for number in range(NUM_BAD):
            label = encode_labelled_group(make.label("fuzz", number // 10, group_id=f"g{number}", domain="fuzz"))
            good = label.SerializeToString()
            await client.publish_labels([make.label("fuzz", number // 10, group_id=f"good{number}", domain="fuzz")])
            num_good += 1
            match number % 4:
                case 0:  # behind the service's back
                    CHANGES[int(random.integers(len(CHANGES)))](label, random)
                    await enqueue(label.SerializeToString())
                    num_dead += 1
                case 1:  # at its door: refused by name, and nothing of the request is queued
                    change = CHANGES[int(random.integers(len(CHANGES)))]
                    change(label, random)
                    right = pb.LabelledGroup.FromString(good)
                    try:
                        await door.PublishLabels(pb.PublishLabelsRequest(groups=[right, label]))
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, change
                        assert "groups[1]" in (error.details() or ""), (change, error.details())
                    else:
                        raise AssertionError(f"{change.__name__} was accepted")
                case 2:
                    await enqueue(damaged(good, random))
                    num_guesses += 1
                case 3:  # seen before
                    await enqueue(good)
                    await enqueue(good)
                    num_good, num_again = num_good + 1, num_again + 1
        await enqueue(random.bytes(10 * 2**20))
        num_dead += 1
    await consumed(client)
    after = await client.get_probe()
    learnt = after.num_groups_consumed - before.num_groups_consumed
    again = after.num_duplicates - before.num_duplicates
    dead = after.num_dead_letters - before.num_dead_letters
    # Flipped bits may leave a label that is right, of a group seen or not.
    assert num_good <= learnt <= num_good + num_guesses
    assert num_again <= again <= num_again + num_guesses
    assert num_dead <= dead <= num_dead + num_guesses
    assert learnt + again + dead == num_good + num_again + num_dead + num_guesses

    (probe,) = (each for each in after.probes if each.domain == "fuzz")
    await fitted(client, "fuzz", probe.probe_version)
    (answer,) = await client.estimate_baselines("fuzz.after", 0, [make.question(domain="fuzz")])
    assert answer.values is not None and np.isfinite(answer.values).all()


async def test_the_sdk_names_what_is_wrong_with_a_label(client: AsyncValueClient, make: Maker) -> None:
    label = make.label("fuzz.sdk", 0)
    label.rewards[1] = np.nan
    try:
        await client.publish_labels([label])
    except PoiseClientError as error:
        assert isinstance(error, InvalidRequestError)
        assert [field for field, _ in error.violations] == ["groups[0].rewards"]
    else:
        raise AssertionError("it was accepted")
