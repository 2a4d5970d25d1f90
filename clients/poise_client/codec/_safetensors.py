"""Creates the header of a safetensors file. Equal parameters give equal headers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

SAFETENSORS_DTYPES = {"float32": ("F32", 4), "float64": ("F64", 8), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Element types of parameters, with their safetensors names and sizes in bytes."""


def safetensors_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the header of a file with these tensors (name, dtype, shape) in this order."""
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
