"""Invalid queue entries of every kind, rejected with the name of the field."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests.unit.value.harness import always_probe

from poise.errors import InvalidRequest
from poise.runtime.rpc.validation import Violations
from poise.value.messages import label_payload, parse_label, read_queries
from poise_client.codec import to_tensor
from poise_proto.v1.common_pb2 import Tensor
from poise_proto.v1.value_pb2 import GroupFeatures, LabelledGroup

Change = Callable[[LabelledGroup], object]
NAN, INFINITE = float("nan"), float("inf")


def vector(*numbers: float) -> Tensor:
    return to_tensor(np.array(numbers, np.float32))


def put(tensor: Tensor, other: Tensor) -> None:
    tensor.CopyFrom(other)


def keep_rollouts(message: LabelledGroup, number: int) -> None:
    del message.rollouts[number:]
    put(message.rewards, vector(*[0.5] * number))


def violations(payload: bytes, max_bytes: int = 1 << 20) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        parse_label(payload, max_bytes, always_probe)
    return [(each.field, each.description) for each in caught.value.violations]


def test_a_valid_label_is_read_to_the_last_bit(make) -> None:
    label = make.label(2**64 - 1, "a.b_c:d/e-F", run_id="run", domain="math", n=3)
    read = parse_label(make.message(label).SerializeToString(), 1 << 20, always_probe)
    assert (read.run_id, read.step, read.group_id, read.domain) == ("run", 2**64 - 1, "a.b_c:d/e-F", "math")
    for name in ("prompt_hidden", "response_hidden", "entropies"):
        np.testing.assert_array_equal(getattr(read.features, name), getattr(label.features, name))
    np.testing.assert_array_equal(read.rewards, label.rewards)


def test_an_empty_domain_is_the_default_one(make) -> None:
    assert parse_label(make.payload(0, domain=""), 1 << 20, always_probe).domain == "default"


def test_the_limits_themselves_are_accepted(make) -> None:
    message = make.message(make.label(0, "g" * 128))
    put(message.rewards, vector(0.0, 1.0))
    payload = message.SerializeToString()
    assert parse_label(payload, len(payload), always_probe).rewards.tolist() == [0, 1]


FIELDS: dict[str, tuple[Change, str]] = {
    "schema of the past": (lambda m: setattr(m, "schema_version", 1), "schema_version"),
    "half a group": (lambda m: setattr(m, "num_rollouts", 2 * len(m.rollouts)), "num_rollouts"),
    "more than a group": (lambda m: setattr(m, "num_rollouts", len(m.rollouts) - 1), "num_rollouts"),
    "no number of rollouts": (lambda m: m.ClearField("num_rollouts"), "num_rollouts"),
    "schema unset": (lambda m: m.ClearField("schema_version"), "schema_version"),
    "schema of the future": (lambda m: setattr(m, "schema_version", 3), "schema_version"),
    "no run": (lambda m: m.ClearField("run_id"), "run_id"),
    "run with a blank": (lambda m: setattr(m, "run_id", "my run"), "run_id"),
    "no group": (lambda m: m.ClearField("group_id"), "group_id"),
    "group too long": (lambda m: setattr(m, "group_id", "g" * 129), "group_id"),
    "group with a line break": (lambda m: setattr(m, "group_id", "g\n"), "group_id"),
    "domain not ASCII": (lambda m: setattr(m, "domain", "mäth"), "domain"),
    "no rollouts": (lambda m: keep_rollouts(m, 0), "rollouts"),
    "one rollout": (lambda m: keep_rollouts(m, 1), "rollouts"),
    "no rewards": (lambda m: m.ClearField("rewards"), "rewards"),
    "one reward": (lambda m: put(m.rewards, vector(0.5)), "rewards"),
    "three rewards": (lambda m: put(m.rewards, vector(0.5, 0.5, 0.5)), "rewards"),
    "reward NaN": (lambda m: put(m.rewards, vector(0.5, NAN)), "rewards"),
    "reward infinite": (lambda m: put(m.rewards, vector(INFINITE, 0.5)), "rewards"),
    "reward below 0": (lambda m: put(m.rewards, vector(-1e-6, 0.5)), "rewards"),
    "reward above 1": (lambda m: put(m.rewards, vector(0.5, 1.0001)), "rewards"),
    "rewards in float64": (lambda m: put(m.rewards, to_tensor(np.zeros(2))), "rewards"),
    "rewards in two axes": (lambda m: put(m.rewards, to_tensor(np.zeros((2, 1), np.float32))), "rewards"),
    "rewards with a byte missing": (lambda m: setattr(m.rewards, "data", m.rewards.data[:-1]), "rewards"),
    "rewards of a huge shape": (lambda m: m.rewards.shape.__setitem__(0, 2**31), "rewards"),
    "rewards of no known dtype": (lambda m: setattr(m.rewards, "dtype", 99), "rewards"),
    "no prompt_hidden": (lambda m: m.rollouts[1].ClearField("prompt_hidden"), "rollouts[1].prompt_hidden"),
    "no response_hidden": (lambda m: m.rollouts[0].ClearField("response_hidden"), "rollouts[0].response_hidden"),
    "two widths in a rollout": (
        lambda m: put(m.rollouts[1].response_hidden, vector(1.0)),
        "rollouts[1].response_hidden",
    ),
    "prompt_hidden in integers": (
        lambda m: put(m.rollouts[0].prompt_hidden, to_tensor(np.zeros(6, np.int32))),
        "rollouts[0].prompt_hidden",
    ),
    "prompt_hidden NaN": (
        lambda m: put(m.rollouts[1].prompt_hidden, vector(*[0.0] * 5, NAN)),
        "rollouts[1].prompt_hidden",
    ),
    "response_hidden infinite": (
        lambda m: put(m.rollouts[0].response_hidden, vector(*[0.0] * 5, -INFINITE)),
        "rollouts[0].response_hidden",
    ),
    "output entropy NaN": (
        lambda m: setattr(m.rollouts[1].output_entropy, "mean", NAN),
        "rollouts[1].output_entropy.mean",
    ),
    "reasoning entropy infinite": (
        lambda m: setattr(m.rollouts[0].reasoning_entropy, "last", INFINITE),
        "rollouts[0].reasoning_entropy.last",
    ),
    "answer entropy NaN": (
        lambda m: setattr(m.rollouts[0].answer_entropy, "min", NAN),
        "rollouts[0].answer_entropy.min",
    ),
}


@pytest.mark.parametrize(("change", "field"), FIELDS.values(), ids=FIELDS)
def test_a_single_wrong_field_is_named(make, change: Change, field: str) -> None:
    message = make.message(make.label(0))
    change(message)
    ((named, description),) = violations(message.SerializeToString())
    assert named == f"group.{field}"
    assert description


def test_rollouts_of_two_widths_are_rejected(make) -> None:
    message = make.message(make.label(0))
    message.rollouts[1].CopyFrom(make.message(make.label(0, width=9)).rollouts[1])
    assert violations(message.SerializeToString()) == [
        ("group.rollouts", "hidden states have widths [6, 9]; all must have the same width, above 0")
    ]


def test_empty_hidden_states_are_rejected(make) -> None:
    message = make.message(make.label(0, width=1))
    for rollout in message.rollouts:
        put(rollout.prompt_hidden, vector())
        put(rollout.response_hidden, vector())
    assert [field for field, _ in violations(message.SerializeToString())] == ["group.rollouts"]


def test_all_wrong_fields_are_named(make) -> None:
    message = make.message(make.label(0, n=3))
    message.run_id = message.group_id = ""
    message.domain = "a b"
    put(message.rewards, vector(0.0, 2.0, 0.0))
    message.rollouts[0].prompt_hidden.dtype = 0
    put(message.rollouts[2].response_hidden, vector(1.0))
    assert [field for field, _ in violations(message.SerializeToString())] == [
        "group.run_id",
        "group.group_id",
        "group.domain",
        "group.rollouts[0].prompt_hidden",
        "group.rollouts[2].response_hidden",
        "group.rewards",
    ]


def test_other_fields_of_another_schema_are_not_checked(make) -> None:
    message = LabelledGroup(schema_version=7)
    assert violations(message.SerializeToString()) == [("group.schema_version", "is 7; must be 2")]


@pytest.mark.parametrize("payload", [b"\xff", b"not a message", b"\x08", "…".encode()])
def test_bytes_that_are_not_a_message_are_rejected(payload: bytes) -> None:
    ((field, description),) = violations(payload)
    assert field == "payload"
    assert "LabelledGroup" in description


def test_an_empty_entry_is_rejected() -> None:
    assert violations(b"")[0][0] == "group.schema_version"


def test_an_entry_over_the_limit_is_not_parsed() -> None:
    ((field, description),) = violations(b"\xff" * 101, max_bytes=100)
    assert (field, description) == ("payload", "is 101 bytes; at most 100 are accepted")


def test_a_truncated_message_is_never_a_label(make) -> None:
    """As after a torn write: a prefix that parses lacks rewards, the last field."""
    payload = make.payload(3)
    for end in range(len(payload)):
        violations(payload[:end])


def test_a_flipped_bit_gives_a_label_or_invalid_request(make) -> None:
    payload = make.payload(3, width=1)
    random = np.random.default_rng(0)
    num_refused = 0
    for _ in range(2000):
        flipped = bytearray(payload)
        flipped[random.integers(len(payload))] ^= 1 << int(random.integers(8))
        try:
            parse_label(bytes(flipped), 1 << 20, always_probe)
        except InvalidRequest:
            num_refused += 1
    assert 500 < num_refused < 2000


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("prompt_hidden", 1e30),
        ("response_hidden", -3e38),
        ("prompt_hidden", 1.1e7),
        ("entropies", -0.5),
        ("entropies", 26.0),
        ("entropies", 1e30),
    ],
)
def test_numbers_that_cannot_be_fitted_are_named(make, field, number):
    label = make.label(0)
    getattr(label.features, field)[1, 0] = number
    name = "output_entropy.mean" if field == "entropies" else field
    with pytest.raises(InvalidRequest, match=rf"rollouts\[1\].{name}: contains .*; allowed: "):
        parse_label(make.message(label).SerializeToString(), 2**20, always_probe)
    query = GroupFeatures(group_id="g", rollouts=make.message(label).rollouts)
    wrong = Violations()
    assert read_queries([query], wrong, always_probe) == [None]
    assert wrong


def test_a_label_survives_serialisation(make):
    label = make.label(3, "g7", n=3)
    again = parse_label(label_payload(label), 2**20, always_probe)
    assert (again.run_id, again.step, again.group_id, again.domain) == ("run", 3, "g7", "default")
    np.testing.assert_array_equal(again.features.entropies, label.features.entropies)
    np.testing.assert_array_equal(again.rewards, label.rewards)
