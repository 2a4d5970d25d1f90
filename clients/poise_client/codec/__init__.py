"""Converts dataclasses of `poise_client.types` to and from protobuf messages. For clients and servicers, not for users.

`encode` and `decode` check structure: required fields, dtypes, shapes, and lengths that must agree. They raise
`CodecError`, which names the field by its path within the message. Servicers check the ranges of values.
"""

from poise_client.codec._converters import (
    LABEL_SCHEMA_VERSION,
    backend_name,
    backend_number,
    decode_hidden,
    decode_token_statistics,
)
from poise_client.codec._delta import MAX_DELTA_ELEMENTS, apply_delta, make_delta, max_block_bytes
from poise_client.codec._files import dump_batch, dump_labels, load_batch, load_labels
from poise_client.codec._mapper import decode, decode_fields, encode
from poise_client.codec._safetensors import SAFETENSORS_DTYPES, safetensors_header
from poise_client.codec._tensor import (
    DTYPE_NAMES,
    DTYPE_NUMBERS,
    MAX_ELEMENTS,
    CodecError,
    DTypeName,
    from_tensor,
    host_dtype,
    to_tensor,
    wire_bytes,
)

__all__ = [
    "DTYPE_NAMES",
    "DTYPE_NUMBERS",
    "LABEL_SCHEMA_VERSION",
    "MAX_DELTA_ELEMENTS",
    "MAX_ELEMENTS",
    "SAFETENSORS_DTYPES",
    "CodecError",
    "DTypeName",
    "apply_delta",
    "backend_name",
    "backend_number",
    "decode",
    "decode_fields",
    "decode_hidden",
    "decode_token_statistics",
    "dump_batch",
    "dump_labels",
    "encode",
    "from_tensor",
    "host_dtype",
    "load_batch",
    "load_labels",
    "make_delta",
    "max_block_bytes",
    "safetensors_header",
    "to_tensor",
    "wire_bytes",
]
