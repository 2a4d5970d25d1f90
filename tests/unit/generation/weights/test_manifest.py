"""Checks of a push's manifest."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from poise.errors import InvalidRequest
from poise.generation.config import GenerationConfig
from poise.generation.weights.manifest import Manifest, TensorSpec, check_shapes, read_manifest
from poise_client import combine_digests
from poise_client.codec import DTYPE_NAMES
from poise_proto.v1 import generation_pb2 as pb

ARRAYS = {
    "model.b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.a": np.arange(5, dtype=np.float64),
    "scalar": np.array(3.0, np.float32),
    "half": np.arange(7, dtype=np.float16),
}
DATA = b"".join(array.tobytes() for array in ARRAYS.values())
TENSORS = [
    TensorSpec(name, array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
    for name, array in ARRAYS.items()
]
DTYPE_NUMBERS = {name: number for number, name in DTYPE_NAMES.items()}
BASE = pb.WeightsBase(lineage_id="lineage", policy_version=0, digest=b"x" * 32)


def changed(index: int, **changes: object) -> list[TensorSpec]:
    return [dataclasses.replace(t, **changes) if i == index else t for i, t in enumerate(TENSORS)]


def message_of(specs: list[TensorSpec], **more: object) -> pb.WeightsManifest:
    tensors = [
        pb.WeightTensor(
            name=tensor.name,
            dtype=DTYPE_NUMBERS.get(tensor.dtype, 0),
            shape=tensor.shape,
            sha256=tensor.sha256,
            num_changed=tensor.num_changed,
            block_bytes=tensor.block_bytes,
        )
        for tensor in specs
    ]
    digest = combine_digests({tensor.name: tensor.sha256 for tensor in specs})
    fields = {"lineage_id": "lineage", "policy_version": 1, "tensors": tensors, "digest": digest}
    return pb.WeightsManifest(**fields | more)


def read(message: pb.WeightsManifest, max_bytes: int = 10_000, group_backend: str = "") -> Manifest:
    config = GenerationConfig(model="tiny", max_update_bytes=max_bytes)
    return read_manifest(message, config, group_backend=group_backend)


def wrong_fields(message: pb.WeightsManifest, **more: object) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        read(message, **more)
    assert len(str(caught.value)) < 300
    return [violation.field for violation in caught.value.violations]


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
def test_wrong_tensor_is_rejected_by_field(tensors: list[TensorSpec], field: str) -> None:
    assert wrong_fields(message_of(tensors)) == [field]


def group(**changes: object) -> pb.ProcessGroup:
    return pb.ProcessGroup(
        **{"backend": pb.PROCESS_GROUP_BACKEND_GLOO, "rendezvous": b"host:1", "timeout_s": 10.0} | changes
    )


@pytest.mark.parametrize(
    ("changes", "backend", "field"),
    [
        ({"process_group": group(), "file": "/a"}, "gloo", "manifest.file"),
        ({"process_group": group(timeout_s=0.0)}, "gloo", "manifest.process_group.timeout_s"),
        ({"process_group": group(timeout_s=3601.0)}, "gloo", "manifest.process_group.timeout_s"),
        ({"process_group": group(timeout_s=float("nan"))}, "gloo", "manifest.process_group.timeout_s"),
        ({"process_group": group(backend=pb.PROCESS_GROUP_BACKEND_NCCL)}, "gloo", "manifest.process_group.backend"),
        ({"process_group": group(backend=0)}, "gloo", "manifest.process_group.backend"),
        ({"process_group": group()}, "", "manifest.process_group"),
    ],
)
def test_wrong_group_is_rejected_by_field(changes: dict[str, object], backend: str, field: str) -> None:
    read(message_of(TENSORS, process_group=group()), group_backend="gloo")
    assert wrong_fields(message_of(TENSORS, **changes), group_backend=backend) == [field]


def test_push_may_fill_the_limit_but_not_exceed_it() -> None:
    read(message_of(TENSORS), max_bytes=len(DATA))
    with pytest.raises(InvalidRequest, match=f"have {len(DATA)} bytes .* at most {len(DATA) - 1} .max_update_bytes"):
        read(message_of(TENSORS), max_bytes=len(DATA) - 1)


def test_digest_covers_the_hashes_in_order_of_name() -> None:
    expected = hashlib.sha256(b"".join(t.sha256 for t in sorted(TENSORS, key=lambda t: t.name))).digest()
    for tensors in (TENSORS, TENSORS[::-1]):
        assert read(message_of(tensors, digest=expected)).policy.digest == expected
    other = changed(0, sha256=b"x" * 32)
    assert wrong_fields(message_of(other, digest=expected)) == ["manifest.digest"]


def test_digest_of_other_tensors_is_rejected() -> None:
    assert wrong_fields(message_of(TENSORS, digest=b"x" * 32)) == ["manifest.digest"]


def test_missing_unknown_and_misshapen_parameters_are_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_shapes({"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (1,)})
    text = caught.value.message
    assert "a is missing" in text
    assert "d is not a parameter of this model" in text
    assert "b has shape [3, 2]; required: [2, 3]" in text
    assert "c " not in text


def test_many_wrong_parameters_are_counted() -> None:
    with pytest.raises(InvalidRequest, match="and 7 more"):
        check_shapes({f"p{i}": (1,) for i in range(12)}, {})


def test_fitting_parameters_are_accepted() -> None:
    check_shapes({"a": (1,)}, {"a": (1,)})


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        (changed(0, num_changed=7, block_bytes=9), "manifest.tensors[0].num_changed"),
        (changed(0, num_changed=2, block_bytes=10_000), "manifest.tensors[0].block_bytes"),
        (changed(0, block_bytes=1), "manifest.tensors[0].block_bytes"),
    ],
)
def test_wrong_delta_is_rejected_by_field(tensors: list[TensorSpec], field: str) -> None:
    assert wrong_fields(message_of(tensors, base=BASE)) == [field]


def test_limit_of_a_delta_counts_whole_parameters() -> None:
    message = message_of(changed(0, num_changed=6, block_bytes=30), base=BASE)
    manifest = read(message, max_bytes=len(DATA))
    assert (manifest.total_bytes, manifest.payload_bytes) == (len(DATA), 30)
    assert read(message_of(TENSORS)).payload_bytes == len(DATA)
    with pytest.raises(InvalidRequest, match="max_update_bytes"):
        read(message, max_bytes=len(DATA) - 1)


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
    tensors = [pb.WeightTensor(shape=[1] * number) for number in num_axes]
    assert wrong_fields(message_of([], tensors=tensors, file=file)) == [field]
