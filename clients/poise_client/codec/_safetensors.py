"""The header of a safetensors file: the same for whoever writes the same parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

SAFETENSORS_DTYPES = {"float32": ("F32", 4), "float64": ("F64", 8), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Element types that parameters may have, with their safetensors names and sizes in bytes."""


def safetensors_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return all that precedes the bytes of these (name, dtype, shape), when they follow in this order."""
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in tensors:
        short, size = SAFETENSORS_DTYPES[dtype]
        end = offset + math.prod(shape) * size
        entries[name] = {"dtype": short, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
