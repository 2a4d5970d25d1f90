import hashlib

import numpy as np
import pytest
from safetensors import safe_open

from poise_client import WeightPush, combine_digests, hash_weights, weights_digest
from poise_client.codec import CodecError, apply_delta
from poise_client.types import WeightArray
from poise_proto.v1 import generation_pb2 as pb

WEIGHTS = {
    "model.norm": WeightArray(np.array([1.5, -2.0], np.float32), "float32"),
    "lm_head": WeightArray(np.arange(6, dtype=np.uint16).reshape(2, 3), "bfloat16"),
    "a.half": WeightArray(np.ones((1, 2, 2), np.float16), "float16"),
    "empty": WeightArray(np.zeros((0, 4), np.float64), "float64"),
}


def by_hand():
    norm = hashlib.sha256(np.array([1.5, -2.0], "<f4").tobytes()).digest()
    head = hashlib.sha256(np.array([0, 1, 2, 3, 4, 5], "<u2").tobytes()).digest()
    half = hashlib.sha256(np.array([1, 1, 1, 1], "<f2").tobytes()).digest()
    empty = hashlib.sha256(b"").digest()
    total = hashlib.sha256()
    for digest in (half, empty, head, norm):  # a.half, empty, lm_head, model.norm: in order of name
        total.update(digest)
    return total.digest()


def test_the_digest_is_sha256_over_sha256s_ordered_by_name():
    assert weights_digest(WEIGHTS) == by_hand()


def test_the_digest_ignores_order_and_memory_layout():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    plain = weights_digest({"a": WeightArray(matrix, "float32"), **WEIGHTS})
    for other in (np.asfortranarray(matrix), np.repeat(matrix, 2, axis=1)[:, ::2]):
        assert weights_digest({**WEIGHTS, "a": WeightArray(other, "float32")}) == plain


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"model.norm": WeightArray(np.array([1.5, -2.5], np.float32), "float32")}, id="a value"),
        pytest.param({"another": WeightArray(np.zeros(1, np.float32), "float32")}, id="one more"),
    ],
)
def test_the_digest_changes_with(changed):
    assert weights_digest(WEIGHTS | changed) != by_hand()


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros(2, np.float64), "float32"),
        (np.zeros(2, np.float32), "bfloat16"),
        (np.zeros(2, np.int32), "int32"),
        (np.array(["a"], object), "float32"),
    ],
)
def test_a_parameter_of_another_dtype_is_rejected_by_name(array, dtype):
    with pytest.raises(CodecError) as caught:
        weights_digest({"lm_head": WeightArray(array, dtype)})
    assert caught.value.field == "weights['lm_head']"


@pytest.mark.parametrize("chunk_bytes", [1, 3, 5, 28, 1000])
def test_a_push_sends_every_byte_once_in_full_chunks(chunk_bytes):
    messages = list(WeightPush.prepare("lineage", 7, WEIGHTS).messages(chunk_bytes))
    begin, commit = messages[0].manifest, messages[-1].commit
    chunks = [message.chunk for message in messages[1:-1]]
    assert [message.WhichOneof("part") for message in messages] == ["manifest", *["chunk"] * len(chunks), "commit"]

    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.offset for chunk in chunks] == list(range(0, len(data), chunk_bytes))
    assert all(len(chunk.data) == chunk_bytes for chunk in chunks[:-1])
    assert commit.total_bytes == len(data) == 8 + 12 + 8
    assert (begin.lineage_id, begin.policy_version, begin.digest) == ("lineage", 7, by_hand())

    itemsize = {pb.WeightTensor().dtype: 0, 1: 4, 2: 8, 3: 2, 4: 2}
    offset = 0
    for tensor in begin.tensors:
        size = int(np.prod(tensor.shape)) * itemsize[tensor.dtype]
        assert hashlib.sha256(data[offset : offset + size]).digest() == tensor.sha256
        offset += size
    assert offset == len(data)


def test_a_push_can_be_sent_again():
    push = WeightPush.prepare("lineage", 7, WEIGHTS)
    assert list(push.messages()) == list(push.messages())


def bf16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def versions(seed=0):
    """Return two versions that differ in a few elements of a matrix and a vector, but not in a third parameter."""
    random = np.random.default_rng(seed)
    matrix, vector = bf16(random.normal(size=(60, 50))), random.normal(size=400).astype(np.float32)
    other, moved = matrix.copy(), vector.copy()
    other.flat[random.choice(matrix.size, 30, replace=False)] += 1
    moved[7] = -moved[7]
    same = WeightArray(np.ones((3, 2), np.float16), "float16")
    return (
        {"m": WeightArray(matrix, "bfloat16"), "v": WeightArray(vector, "float32"), "s": same},
        {"m": WeightArray(other, "bfloat16"), "v": WeightArray(moved, "float32"), "s": same},
    )


def test_a_delta_has_the_manifest_and_only_changed_blocks():
    old, new = versions()
    base, full = WeightPush.prepare("l", 3, old), WeightPush.prepare("l", 4, new, keep_as_base=True)
    delta = full.delta(base)
    assert delta is not None
    assert (delta.is_delta, full.is_delta) == (True, False)
    assert delta.payload_bytes < full.payload_bytes / 20
    assert delta.manifest.base == pb.WeightsBase(lineage_id="l", policy_version=3, digest=weights_digest(old))
    assert [tensor.num_changed for tensor in delta.manifest.tensors] == [30, 1, 0]
    assert [tensor.block_bytes for tensor in delta.manifest.tensors] == [len(block) for block in delta.payload]
    assert delta.manifest.tensors[2].block_bytes == 0
    whole = pb.WeightsManifest()
    whole.CopyFrom(delta.manifest)
    whole.ClearField("base")
    for tensor in whole.tensors:
        tensor.num_changed = tensor.block_bytes = 0
    assert whole == full.manifest
    for block, name, size in zip(delta.payload, "mvs", (2, 4, 2), strict=True):
        rebuilt = bytearray(old[name].array.tobytes())
        apply_delta(rebuilt, block, len(block) and {"m": 30, "v": 1}[name], size, name)
        assert rebuilt == new[name].array.tobytes()


def test_no_delta_for_other_shapes_or_many_changes():
    old, new = versions()
    full = WeightPush.prepare("l", 4, new)
    reshaped = old | {"m": WeightArray(old["m"].array.reshape(50, 60), "bfloat16")}
    changed = old | {"m": WeightArray(old["m"].array + np.uint16(1), "bfloat16")}
    for other in (reshaped, {"m": old["m"], "v": old["v"]}, dict(reversed(old.items())), changed):
        assert full.delta(WeightPush.prepare("l", 3, other)) is None
    delta = full.delta(WeightPush.prepare("l", 3, old))
    with pytest.raises(ValueError, match="two full pushes"):
        full.delta(delta)


def test_a_push_in_a_file_sends_its_path_and_no_chunks(tmp_path):
    _, new = versions()
    push = WeightPush.prepare("l", 4, new)
    path = tmp_path / "weights"
    path.write_bytes(b"".join(push.file_parts()))
    begin, commit = push.in_file(str(path)).messages()
    assert begin.manifest.file == str(path)
    assert commit.commit.total_bytes == push.payload_bytes
    assert not push.manifest.file
    with safe_open(path, framework="numpy") as file:
        assert list(file.keys()) == sorted(new)
        np.testing.assert_array_equal(file.get_tensor("v"), new["v"].array)
        assert file.get_slice("m").get_dtype() == "BF16"


def test_a_file_of_a_delta_has_only_its_blocks():
    old, new = versions()
    delta = WeightPush.prepare("l", 4, new).delta(WeightPush.prepare("l", 3, old))
    assert b"".join(delta.file_parts()) == b"".join(delta.payload)


def test_passed_hashes_are_not_computed_again():
    given = {name: name.encode().ljust(32) for name in WEIGHTS}
    push = WeightPush.prepare("l", 4, WEIGHTS, sha256_by_name=given)
    assert {tensor.name: tensor.sha256 for tensor in push.manifest.tensors} == given
    assert push.manifest.digest == combine_digests(given)
    assert combine_digests(hash_weights(WEIGHTS)) == by_hand()
