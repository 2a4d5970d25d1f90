"""Invalid labels, published and queued directly, are rejected by name or dead-lettered, never learnt."""

from __future__ import annotations

from collections import Counter

import grpc.aio
import numpy as np
import redis.asyncio
from tests.integration.value.service import Maker, ValueService, consumed, fitted, warm_up

from poise_client import AsyncValueClient
from poise_client.codec import encode, to_tensor
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
    """Return a label with enough rollouts, but only half of those sampled."""
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
    label.run_id = str(random.choice(["", "a b", "x" * 200, "naïve"]))


def no_group(label: pb.LabelledGroup, random: Random) -> None:
    label.group_id = ""


def domain_of_no_name(label: pb.LabelledGroup, random: Random) -> None:
    label.domain = "x\ny"


def entropy_not_a_number(label: pb.LabelledGroup, random: Random) -> None:
    label.rollouts[1].output_entropy.max = float("nan")


def entropy_negative(label: pb.LabelledGroup, random: Random) -> None:
    label.rollouts[1].reasoning_entropy.min = -5.0


def entropy_beyond_any_vocabulary(label: pb.LabelledGroup, random: Random) -> None:
    label.rollouts[0].answer_entropy.mean = float(random.choice([26.0, 1e30]))


def hidden_state_beyond_squaring(label: pb.LabelledGroup, random: Random) -> None:
    huge = np.zeros(8, np.float32)
    huge[random.integers(8)] = random.choice([1e30, -3e38, 1.1e7])
    label.rollouts[1].prompt_hidden.CopyFrom(to_tensor(huge))


CHANGES = {
    entropy_negative: "group.rollouts[1].reasoning_entropy.min: contains -5; allowed: -0.001 to 25",
    entropy_beyond_any_vocabulary: "group.rollouts[0].answer_entropy.mean: contains ",
    hidden_state_beyond_squaring: "group.rollouts[1].prompt_hidden: contains ",
    nan_in_features: "group.rollouts[0].response_hidden: contains NaN",
    nan_reward: "group.rewards: must be in [0, 1]",
    reward_out_of_range: "group.rewards: must be in [0, 1]",
    reward_missing: "group.rewards: has 1 elements; the group has 2 rollouts",
    unknown_schema: "group.schema_version: is ",
    half_a_group: "group.num_rollouts: is 4, but the message has 2 rollouts",
    a_group_of_one: "group.rollouts: has 1 rollouts; at least 2 are needed",
    another_width: "group.rollouts: hidden states have width 5, but those of domain 'fuzz' have 8",
    widths_that_differ: "group.rollouts[1].response_hidden: ",
    bytes_that_do_not_fit_the_shape: "group.rollouts[0].prompt_hidden: ",
    no_run: "group.run_id: is ",
    no_group: "group.group_id: is empty",
    domain_of_no_name: "group.domain: is ",
    entropy_not_a_number: "group.rollouts[1].output_entropy.max: contains NaN",
}
"""Changes that make a label invalid, and the beginning of the reason."""


def damaged(payload: bytes, kind: int, random: Random) -> bytes:
    """Truncate, flip bits, or return noise. The result may be valid by chance."""
    if kind == 0:
        return payload[: int(random.integers(len(payload)))]
    if kind == 1:
        noisy = np.frombuffer(payload, np.uint8).copy()
        places = random.integers(noisy.size, size=int(random.integers(1, 9)))
        noisy[places] ^= random.integers(1, 256, size=places.size).astype(np.uint8)
        return noisy.tobytes()
    return random.bytes(int(random.integers(0, 300)))


async def test_invalid_labels_never_block_valid_ones(
    shared: ValueService, client: AsyncValueClient, make: Maker, valkey_url: str
) -> None:
    random = np.random.default_rng(SEED)
    await warm_up(client, make, "fuzz")
    before = await client.get_probe()
    num_good = num_dead = num_guesses = num_again = 0
    reasons: Counter[str] = Counter()
    """The expected reasons of labels that were queued directly."""
    async with (
        redis.asyncio.from_url(valkey_url) as server,
        grpc.aio.insecure_channel(shared.grpc) as channel,
    ):
        stub = value_pb2_grpc.ValueServiceStub(channel)

        async def enqueue(payload: bytes) -> None:
            await server.xadd(shared.folder.name, {"group": payload})

        for number in range(NUM_BAD):
            label = encode(make.label("fuzz", number // 10, group_id=f"g{number}", domain="fuzz"), pb.LabelledGroup)
            good = label.SerializeToString()
            await client.publish_labels([make.label("fuzz", number // 10, group_id=f"good{number}", domain="fuzz")])
            num_good += 1
            change, reason = list(CHANGES.items())[
                number // 4 % len(CHANGES)
            ]  # every change with every way of publishing
            match number % 4:
                case 0:  # queued directly
                    change(label, random)
                    reasons[reason] += 1
                    await enqueue(label.SerializeToString())
                    num_dead += 1
                case 1:  # published: rejected by name, and nothing of the request is queued
                    change(label, random)
                    right = pb.LabelledGroup.FromString(good)
                    try:
                        await stub.PublishLabels(pb.PublishLabelsRequest(groups=[right, label]))
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, change
                        assert "groups[1]" in (error.details() or ""), (change, error.details())
                    else:
                        raise AssertionError(f"{change.__name__} was accepted")
                case 2:
                    await enqueue(damaged(good, number // 4 % 3, random))
                    num_guesses += 1
                case 3:  # a duplicate
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
    # Flipped bits may leave a valid label, of a new or a known group.
    assert num_good <= learnt <= num_good + num_guesses
    assert num_again <= again <= num_again + num_guesses
    assert num_dead <= dead <= num_dead + num_guesses
    assert learnt + again + dead == num_good + num_again + num_dead + num_guesses

    assert len(reasons) == len(set(CHANGES.values()))
    listed = await shared.get("/admin/v1/dead-letters?limit=1000")
    assert listed is not None
    reasons_listed = [letter["reason"].removeprefix("invalid request: ") for letter in listed.json()[:dead]]
    for reason, count in reasons.items():
        assert sum(each.startswith(reason) for each in reasons_listed) >= count, (reason, reasons_listed)
    assert sum(each.startswith("payload: is 10485760 bytes; at most ") for each in reasons_listed) == 1

    (probe,) = (each for each in after.probes if each.domain == "fuzz")
    await fitted(client, "fuzz", probe.probe_version)
    (answer,) = await client.estimate_baselines("fuzz.after", 0, [make.query(domain="fuzz")])
    assert answer.values is not None and np.isfinite(answer.values).all()


async def test_the_sdk_names_the_invalid_field_of_a_label(client: AsyncValueClient, make: Maker) -> None:
    label = make.label("fuzz.sdk", 0).scored([0, np.nan])
    try:
        await client.publish_labels([label])
    except PoiseClientError as error:
        assert isinstance(error, InvalidRequestError)
        assert [field for field, _ in error.violations] == ["groups[0].rewards"]
    else:
        raise AssertionError("it was accepted")
