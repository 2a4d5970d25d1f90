import hashlib

import numpy as np
import pytest

from poise_client import weights_digest
from poise_client._weights import Push
from poise_client.codec import CodecError
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


def test_the_digest_is_sha256_over_the_tensors_sha256_in_order_of_name():
    assert weights_digest(WEIGHTS) == by_hand()


def test_the_digest_depends_neither_on_order_nor_on_memory_layout():
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
def test_a_parameter_that_is_not_what_it_says_is_refused_by_name(array, dtype):
    with pytest.raises(CodecError) as caught:
        weights_digest({"lm_head": WeightArray(array, dtype)})
    assert caught.value.field == "weights['lm_head']"


@pytest.mark.parametrize("chunk_bytes", [1, 3, 5, 28, 1000])
def test_a_push_sends_every_byte_once_in_full_chunks(chunk_bytes):
    messages = list(Push.prepare("lineage", 7, WEIGHTS).messages(chunk_bytes))
    begin, commit = messages[0].begin, messages[-1].commit
    chunks = [message.chunk for message in messages[1:-1]]
    assert [message.WhichOneof("part") for message in messages] == ["begin", *["chunk"] * len(chunks), "commit"]

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
    push = Push.prepare("lineage", 7, WEIGHTS)
    assert list(push.messages()) == list(push.messages())
