"""Converts numpy arrays to and from `Tensor` messages. bfloat16, which numpy lacks, becomes raw uint16 bits."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poise_client.types import Floats, Halves, Ints
from poise_proto.v1 import common_pb2 as pb

DTypeName = Literal["float32", "float64", "bfloat16", "float16", "int32", "int64"]

DTYPE_NUMBERS: Mapping[DTypeName, pb.Dtype.ValueType] = MappingProxyType(
    {
        "float32": pb.DTYPE_FLOAT32,
        "float64": pb.DTYPE_FLOAT64,
        "bfloat16": pb.DTYPE_BFLOAT16,
        "float16": pb.DTYPE_FLOAT16,
        "int32": pb.DTYPE_INT32,
        "int64": pb.DTYPE_INT64,
    }
)
"""Numbers of element types on the wire, by name."""

DTYPE_NAMES: Mapping[int, DTypeName] = MappingProxyType({number: name for name, number in DTYPE_NUMBERS.items()})
"""Names of element types, by number on the wire. DTYPE_UNSPECIFIED is absent."""

_BY_DTYPE: Mapping[str, DTypeName] = MappingProxyType({name: name for name in DTYPE_NUMBERS if name != "bfloat16"})

MAX_ELEMENTS = 2**20
"""Default limit of `from_tensor`: as many float32 elements as fit gRPC's default limit of 4 MiB."""

_SHOWN_AXES = 8


class CodecError(ValueError):
    """A value does not fit its message, or a message is malformed."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        """Path of the field, such as `groups[2].rollouts[0].prompt_hidden`."""
        self.description = description
        """What is wrong and what is allowed."""


def host_dtype(name: DTypeName) -> np.dtype[np.generic]:
    """Return the numpy dtype of elements of type `name`, in the byte order of this host."""
    return np.dtype(np.uint16 if name == "bfloat16" else name)


def wire_bytes(array: NDArray[np.generic]) -> bytes:
    """Return the elements as bytes: little-endian, in C order."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def to_tensor(array: ArrayLike, dtype: DTypeName | None = None, *, field: str = "tensor") -> pb.Tensor:
    """Pack an array.

    Args:
        array: anything that numpy converts to an array, of any shape.
        dtype: element type on the wire; None uses that of the array. Floats may be rounded to narrower floats, and
            integers cast to other integer types that can represent them. Other casts are rejected. bfloat16 takes raw
            uint16 bits.
        field: path of the array, for errors.

    Raises:
        CodecError: the element type is not supported, or the cast would lose more than precision.
    """
    try:
        source = np.asarray(array)
    except ValueError as error:
        raise CodecError(field, f"is not an array: {error}") from error
    name = dtype or _BY_DTYPE.get(source.dtype.name)
    if name is None:
        hint = 'dtype="bfloat16" for raw bfloat16 bits' if source.dtype == np.uint16 else ", ".join(DTYPE_NUMBERS)
        raise CodecError(field, f"has elements of type {source.dtype.name}; use {hint}")
    return pb.Tensor(dtype=DTYPE_NUMBERS[name], shape=source.shape, data=wire_bytes(_cast(source, name, field)))


def _cast(source: NDArray[np.generic], dtype: DTypeName, field: str) -> NDArray[np.generic]:
    target = host_dtype(dtype)
    if source.dtype == target or source.size == 0:
        return source.astype(target, copy=False)
    if dtype == "bfloat16" or source.dtype.kind not in "iuf" or (source.dtype.kind == "f" and target.kind != "f"):
        wanted = "uint16 bits" if dtype == "bfloat16" else f"elements that {dtype} can hold"
        raise CodecError(field, f"elements of type {source.dtype.name} cannot be sent as {dtype}; pass {wanted}")
    if target.kind == "i":
        limits = np.iinfo(target.name)
        low, high = int(np.min(source)), int(np.max(source))
        if low < limits.min or high > limits.max:
            raise CodecError(field, f"values {low}..{high} exceed {dtype}")
    try:
        with np.errstate(over="raise"):
            return source.astype(target)
    except FloatingPointError as error:
        raise CodecError(field, f"values exceed {dtype}") from error


@overload
def from_tensor(
    tensor: pb.Tensor,
    *,
    dtype: Literal["float32"] = "float32",
    ndim: int = 1,
    field: str = "tensor",
    max_elements: int = MAX_ELEMENTS,
) -> Floats: ...
@overload
def from_tensor(
    tensor: pb.Tensor,
    *,
    dtype: Literal["int32"],
    ndim: int = 1,
    field: str = "tensor",
    max_elements: int = MAX_ELEMENTS,
) -> Ints: ...
@overload
def from_tensor(
    tensor: pb.Tensor,
    *,
    dtype: Literal["float16"],
    ndim: int = 1,
    field: str = "tensor",
    max_elements: int = MAX_ELEMENTS,
) -> Halves: ...
@overload
def from_tensor(
    tensor: pb.Tensor, *, dtype: DTypeName, ndim: int = 1, field: str = "tensor", max_elements: int = MAX_ELEMENTS
) -> NDArray[np.generic]: ...
def from_tensor(
    tensor: pb.Tensor,
    *,
    dtype: DTypeName = "float32",
    ndim: int = 1,
    field: str = "tensor",
    max_elements: int = MAX_ELEMENTS,
) -> NDArray[np.generic]:
    """Return a tensor as a read-only array in the byte order of this host, after checking it.

    Args:
        tensor: the message. It is not trusted.
        dtype: the accepted element type. bfloat16 becomes uint16.
        ndim: the accepted number of axes.
        field: path of the tensor, for errors.
        max_elements: maximum number of elements.

    Raises:
        CodecError: it is unset or too large, its dtype or number of axes differs, or its data does not match its shape.
    """
    sent = DTYPE_NAMES.get(tensor.dtype)
    if sent is None:
        state = f"has unknown dtype {tensor.dtype}" if tensor.dtype else "is unset"
        raise CodecError(field, f"{state}; required: {dtype} with {ndim} axes")
    if sent != dtype:
        raise CodecError(field, f"is {sent}; required: {dtype}")
    num_axes = len(tensor.shape)
    if num_axes != ndim:  # check first: a malicious shape is neither copied nor multiplied
        found = f"has shape {tensor.shape[:]}" if num_axes <= _SHOWN_AXES else f"has {num_axes} axes"
        raise CodecError(field, f"{found}; required: {ndim} axes")
    shape = tensor.shape[:]
    num_elements = math.prod(shape)
    if num_elements > max_elements:
        raise CodecError(field, f"has {num_elements} elements; at most {max_elements} are accepted")
    native = host_dtype(dtype)
    num_bytes = num_elements * native.itemsize
    data = tensor.data  # protobuf copies at every access
    if len(data) != num_bytes:
        raise CodecError(field, f"has {len(data)} bytes; shape {shape} of {dtype} takes {num_bytes}")
    if sys.byteorder == "big":
        array = np.frombuffer(data, native.newbyteorder("<")).astype(native)
        array.flags.writeable = False
    else:
        array = np.frombuffer(data, native)
    return array.reshape(shape)


def vector(array: ArrayLike, field: str, dtype: DTypeName = "float32") -> pb.Tensor:
    """Pack an array that must have one axis."""
    tensor = to_tensor(array, dtype, field=field)
    if len(tensor.shape) != 1:
        raise CodecError(field, f"has shape {list(tensor.shape)}; required: 1 axis")
    return tensor
