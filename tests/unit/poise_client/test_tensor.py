import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from poise_client.codec import DTYPE_NUMBERS, CodecError, from_tensor, host_dtype, to_tensor
from poise_proto.v1 import common_pb2 as pb


@st.composite
def typed_arrays(draw):
    name = draw(st.sampled_from(sorted(DTYPE_NUMBERS)))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    return name, draw(npst.arrays(host_dtype(name), shape))


@given(typed_arrays())
def test_arrays_are_decoded_bit_for_bit(case):
    name, array = case
    message = pb.Tensor.FromString(to_tensor(array, name).SerializeToString())
    back = from_tensor(message, dtype=name, ndim=array.ndim)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_any_memory_layout_is_sent_little_endian_in_c_order():
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert to_tensor(array).data == np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()


def test_decoded_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        from_tensor(to_tensor(np.zeros(3, np.float32)))[0] = 1


def test_lists_and_wider_floats_are_cast():
    assert from_tensor(to_tensor([0.1, 0.2], "float32")).tolist() == np.array([0.1, 0.2], np.float32).tolist()
    assert from_tensor(to_tensor([1, 2], "int32"), dtype="int32").tolist() == [1, 2]
    assert from_tensor(to_tensor([], "int32"), dtype="int32").size == 0


@pytest.mark.parametrize(
    ("array", "dtype", "text"),
    [
        pytest.param(["a"], None, "has elements of type", id="strings"),
        pytest.param(np.array([1], np.uint16), None, 'dtype="bfloat16"', id="uint16 without a name"),
        pytest.param([[1.0], [1.0, 2.0]], "float32", "is not an array", id="ragged"),
        pytest.param([1.5], "int32", "cannot be sent as int32", id="floats as integers"),
        pytest.param([True], "int32", "cannot be sent as int32", id="booleans as integers"),
        pytest.param([1.5], "bfloat16", "pass uint16 bits", id="floats as bfloat16"),
        pytest.param([2**31], "int32", "exceed int32", id="integer too large"),
        pytest.param([-(2**31) - 1], "int32", "exceed int32", id="integer too small"),
        pytest.param([1e300], "float32", "exceed float32", id="float too large"),
        pytest.param([1j], "float32", "cannot be sent", id="complex"),
    ],
)
def test_casts_that_change_values_are_rejected(array, dtype, text):
    with pytest.raises(CodecError, match=text) as caught:
        to_tensor(array, dtype, field="a.b")
    assert caught.value.field == "a.b"


def _tensor(dtype=pb.DTYPE_FLOAT32, shape=(2,), data=bytes(8)):
    return pb.Tensor(dtype=dtype, shape=shape, data=data)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        pytest.param(pb.Tensor(), "is unset", id="unset"),
        pytest.param(_tensor(dtype=99), "unknown dtype 99", id="a dtype of the future"),
        pytest.param(_tensor(dtype=pb.DTYPE_INT32), "is int32; required: float32", id="another dtype"),
        pytest.param(_tensor(shape=()), "required: 1 axes", id="no axis"),
        pytest.param(_tensor(shape=(1, 2)), "required: 1 axes", id="two axes"),
        pytest.param(_tensor(data=bytes(7)), "has 7 bytes", id="too few bytes"),
        pytest.param(_tensor(data=bytes(9)), "has 9 bytes", id="too many bytes"),
        pytest.param(_tensor(shape=(2**32 - 1,)), "at most 4 are accepted", id="a shape that claims gigabytes"),
    ],
)
def test_a_malformed_tensor_is_rejected_by_field(tensor, text):
    with pytest.raises(CodecError, match=text) as caught:
        from_tensor(tensor, field="groups[2].values", max_elements=4)
    assert caught.value.field == "groups[2].values"
    assert str(caught.value).startswith("groups[2].values: ")
