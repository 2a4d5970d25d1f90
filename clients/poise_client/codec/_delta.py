"""Lossless deltas between two versions of a parameter. docs/reference/delta_format.md defines the format.

Consecutive versions of a bfloat16 policy differ in few elements, most of them by the smallest step. So gaps between
positions and differences of bits are small numbers, which zlib compresses well.

Shapes: K changed elements.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from poise_client.codec._tensor import CodecError

Buffer = bytes | bytearray | memoryview

MAX_DELTA_ELEMENTS = 2**32
"""Maximum number of elements of a tensor, because positions have 32 bits."""

_LEVEL = 1
"""zlib's compression level. Higher levels take several times as long to save a tenth."""

_POSITION_BYTES = 4


def make_delta(base: Buffer, new: Buffer, itemsize: int) -> tuple[int, bytes]:
    """Return the number of elements that differ, and their block, which is empty if there are none.

    Both buffers must have the same number of elements of `itemsize` bytes, at most `MAX_DELTA_ELEMENTS`.
    """
    old, now = _elements(base, itemsize), _elements(new, itemsize)
    positions_K = np.flatnonzero(old != now)
    if not positions_K.size:
        return 0, b""
    gaps_K = np.diff(positions_K, prepend=-1).astype("<u4")
    differences_K = now[positions_K] - old[positions_K]  # modulo their size
    packer = zlib.compressobj(_LEVEL)
    parts = [packer.compress(_planes(gaps_K)), packer.compress(_planes(_zigzag(differences_K))), packer.flush()]
    return positions_K.size, b"".join(parts)


def max_block_bytes(num_changed: int, itemsize: int) -> int:
    """Return the maximum size of a block with this number of changed elements."""
    content = num_changed * (_POSITION_BYTES + itemsize)
    return content + content // 1000 + 64  # zlib's overhead on incompressible data


def apply_delta(target: bytearray | memoryview, block: Buffer, num_changed: int, itemsize: int, field: str) -> None:
    """Change the base in `target` to the new version, in place.

    Raises:
        CodecError: the block is malformed; the error names `field`. The content of `target` is then undefined.
    """
    if not num_changed:
        if block:
            raise CodecError(field, "has a block, but num_changed is 0")
        return
    content = _unpack(block, num_changed * (_POSITION_BYTES + itemsize), field)
    split = num_changed * _POSITION_BYTES
    gaps_K = _from_planes(content[:split], _POSITION_BYTES)
    positions_K = gaps_K.astype(np.int64).cumsum() - 1
    elements = _elements(target, itemsize)
    if not gaps_K.all() or int(positions_K[-1]) >= elements.size:
        raise CodecError(field, f"repeats a position, or exceeds the {elements.size} elements")
    zigzag_K = _from_planes(content[split:], itemsize)
    elements[positions_K] += (zigzag_K >> 1) ^ -(zigzag_K & 1)


def _unpack(block: Buffer, num_bytes: int, field: str) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(block, num_bytes + 1)  # one byte above the limit, to stop a zlib bomb
    except zlib.error as error:
        raise CodecError(field, f"is not a zlib stream: {error}") from error
    if len(content) != num_bytes or not unpacker.eof or unpacker.unused_data:
        raise CodecError(field, f"does not decompress to {num_bytes} bytes")
    return content


def _elements(data: Buffer, itemsize: int) -> NDArray[np.unsignedinteger]:
    elements: NDArray[np.unsignedinteger] = np.frombuffer(data, f"<u{itemsize}")
    return elements


def _zigzag(differences_K: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Map 0, -1, 1, -2, ... to 0, 1, 2, 3, ...: small differences of either sign get small codes."""
    sign_K = differences_K >> (8 * differences_K.itemsize - 1)
    codes_K: NDArray[np.unsignedinteger] = (differences_K << 1) ^ np.negative(sign_K)
    return codes_K


def _planes(values_K: NDArray[np.unsignedinteger]) -> bytes:
    return values_K.view(np.uint8).reshape(-1, values_K.itemsize).T.tobytes()


def _from_planes(content: bytes, itemsize: int) -> NDArray[np.unsignedinteger]:
    bytes_wK = np.frombuffer(content, np.uint8).reshape(itemsize, -1)
    return _elements(np.ascontiguousarray(bytes_wK.T).reshape(-1).data, itemsize)
