"""What a push must announce."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from poise.errors import InvalidRequest
from poise.generation.served_policy import ServedPolicy
from poise.generation.weights.manifest import (
    Announcement,
    ExpectedTensor,
    check_announcement,
    check_sizes,
    check_weights,
    policy_digest,
)
from poise.runtime.network.broadcast_group import Rendezvous

ARRAYS = {
    "model.b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.a": np.arange(5, dtype=np.float64),
    "scalar": np.array(3.0, np.float32),
    "half": np.arange(7, dtype=np.float16),
}
DATA = b"".join(array.tobytes() for array in ARRAYS.values())
TENSORS = [
    ExpectedTensor(name, array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
    for name, array in ARRAYS.items()
]


def changed(index: int, **changes: object) -> list[ExpectedTensor]:
    return [dataclasses.replace(t, **changes) if i == index else t for i, t in enumerate(TENSORS)]


def announcement(tensors: list[ExpectedTensor], **more: object) -> Announcement:
    return Announcement(ServedPolicy("lineage", 1, policy_digest(tensors)), tuple(tensors), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        (changed(1, name=""), "manifest.tensors[1].name"),
        (changed(1, name="../../etc/pass wd"), "manifest.tensors[1].name"),
        (changed(1, name="x" * 513), "manifest.tensors[1].name"),
        (changed(2, name="model.b"), "manifest.tensors[2].name"),
        (changed(0, dtype="int32"), "manifest.tensors[0].dtype"),
        (changed(0, dtype=""), "manifest.tensors[0].dtype"),
        (changed(3, sha256=b"x" * 31), "manifest.tensors[3].sha256"),
        (changed(3, shape=(2**20, 2**20)), "manifest.tensors"),
        (changed(0, num_changed=1), "manifest.tensors[0].num_changed"),
        (changed(0, block_bytes=1), "manifest.tensors[0].block_bytes"),
    ],
)
def test_impossible_announcement_is_refused_by_field(tensors: list[ExpectedTensor], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_announcement(announcement(tensors), max_bytes=10_000)
    assert [violation.field for violation in caught.value.violations] == [field]


GROUP = {"rendezvous": Rendezvous("gloo", b"host:1"), "timeout_s": 10.0}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"file": "/a"}, "manifest.file"),
        ({"timeout_s": 0.0}, "manifest.process_group.timeout_s"),
        ({"timeout_s": 3601.0}, "manifest.process_group.timeout_s"),
        ({"timeout_s": float("nan")}, "manifest.process_group.timeout_s"),
    ],
)
def test_impossible_group_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    check_announcement(announcement(TENSORS, **GROUP), max_bytes=10_000)
    with pytest.raises(InvalidRequest) as caught:
        check_announcement(announcement(TENSORS, **GROUP | changes), max_bytes=10_000)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_announcement_may_fill_the_limit_and_not_exceed_it() -> None:
    check_announcement(announcement(TENSORS), max_bytes=len(DATA))
    with pytest.raises(InvalidRequest, match=f"hold {len(DATA)} bytes; max_update_bytes is {len(DATA) - 1}"):
        check_announcement(announcement(TENSORS), max_bytes=len(DATA) - 1)


def test_digest_is_over_the_names_in_order_whatever_the_order_sent() -> None:
    expected = hashlib.sha256(b"".join(t.sha256 for t in sorted(TENSORS, key=lambda t: t.name))).digest()
    assert policy_digest(TENSORS) == policy_digest(TENSORS[::-1]) == expected
    assert policy_digest(changed(0, sha256=b"x" * 32)) != expected


def test_misfits_are_named_missing_unknown_and_misshaped() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_weights({"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (1,)})
    text = caught.value.message
    assert "a is missing" in text
    assert "d is no parameter of this model" in text
    assert "b has shape [3, 2], the model's has [2, 3]" in text
    assert "c " not in text


def test_many_misfits_are_counted() -> None:
    with pytest.raises(InvalidRequest, match="and 7 more"):
        check_weights({f"p{i}": (1,) for i in range(12)}, {})


def test_fitting_weights_are_accepted() -> None:
    check_weights({"a": (1,)}, {"a": (1,)})


BASE = ServedPolicy("lineage", 0, b"x" * 32)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        (changed(0, num_changed=7, block_bytes=9), "manifest.tensors[0].num_changed"),
        (changed(0, num_changed=2, block_bytes=10_000), "manifest.tensors[0].block_bytes"),
        (changed(0, block_bytes=1), "manifest.tensors[0].block_bytes"),
    ],
)
def test_impossible_delta_is_refused_by_field(tensors: list[ExpectedTensor], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_announcement(announcement(tensors, base=BASE), max_bytes=10_000)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_delta_counts_by_its_whole_parameters_and_travels_as_its_blocks() -> None:
    announced = announcement(changed(0, num_changed=6, block_bytes=30), base=BASE)
    check_announcement(announced, max_bytes=len(DATA))
    with pytest.raises(InvalidRequest, match="max_update_bytes"):
        check_announcement(announced, max_bytes=len(DATA) - 1)
    assert (announced.total_bytes, announced.body_bytes) == (len(DATA), 30)
    assert announcement(TENSORS).body_bytes == len(DATA)


def test_digest_that_is_not_of_these_tensors_is_refused() -> None:
    announced = dataclasses.replace(announcement(TENSORS), policy=ServedPolicy("lineage", 1, b"x" * 32))
    with pytest.raises(InvalidRequest, match=r"manifest\.digest"):
        check_announcement(announced, max_bytes=10_000)


@pytest.mark.parametrize(
    ("num_axes", "file", "field"),
    [
        ([], "", "manifest.tensors"),
        ([1] * 65537, "", "manifest.tensors"),
        ([2, 9], "", "manifest.tensors[1].shape"),
        ([500_000], "", "manifest.tensors[0].shape"),
        ([1], "/dev/shm/a\0b", "manifest.file"),
        ([1], "/" + "x" * 5000, "manifest.file"),
    ],
)
def test_sizes_are_checked_before_use(num_axes: list[int], file: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sizes(num_axes, file)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert len(str(caught.value)) < 300
