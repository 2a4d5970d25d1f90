"""A policy's parameters as they travel: digests, and the messages of a push.

Knows neither channels nor retries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from poise_client.codec import DTYPE_NUMBERS, CodecError, host_dtype
from poise_client.types import WeightArray
from poise_proto.v1 import generation_pb2 as pb

CHUNK_BYTES = 2**20
"""Parameters travel in chunks of 1 MiB."""

_DTYPES = frozenset({"float32", "float64", "float16", "bfloat16"})


def wire_view(weight: WeightArray, name: str) -> memoryview:
    """Return a parameter's bytes as they travel, without copying what already lies so in memory.

    Raises:
        CodecError: the array's element type is not what `weight.dtype` says.
    """
    if weight.dtype not in _DTYPES or weight.array.dtype != host_dtype(weight.dtype):
        raise CodecError(
            f"weights[{name!r}]",
            f"holds {weight.array.dtype.name} and says {weight.dtype}; required: float32, float64, float16, "
            "or bfloat16 as its raw uint16 bits",
        )
    little = weight.array.astype(weight.array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8).data


def combine_digests(sha256_by_name: Mapping[str, bytes]) -> bytes:
    """Return the digest of a whole policy: SHA-256 over its parameters' SHA-256 in order of name."""
    return hashlib.sha256(b"".join(sha256_by_name[name] for name in sorted(sha256_by_name))).digest()


def weights_digest(weights: Mapping[str, WeightArray]) -> bytes:
    """Return the 32 bytes that name these parameters, as in `Policy.digest`. Hashes every byte: a second or so a GB.

    Raises:
        CodecError: a parameter is not what its dtype says.
    """
    return combine_digests({name: _sha256(weight, name) for name, weight in weights.items()})


def _sha256(weight: WeightArray, name: str) -> bytes:
    return hashlib.sha256(wire_view(weight, name)).digest()


@dataclass(frozen=True, slots=True)
class Push:
    """A push made ready: hashed once, sent as often as it takes."""

    begin: pb.WeightsBegin
    views: tuple[memoryview, ...]

    @classmethod
    def prepare(cls, lineage_id: str, policy_version: int, weights: Mapping[str, WeightArray]) -> Push:
        """Hash the parameters. Takes as long as `weights_digest`: not for an event loop's own thread."""
        sha256_by_name = {name: _sha256(weight, name) for name, weight in weights.items()}
        begin = pb.WeightsBegin(
            lineage_id=lineage_id,
            policy_version=policy_version,
            tensors=[
                pb.WeightTensor(
                    name=name,
                    dtype=DTYPE_NUMBERS[weight.dtype],
                    shape=weight.array.shape,
                    sha256=sha256_by_name[name],
                )
                for name, weight in weights.items()
            ],
            digest=combine_digests(sha256_by_name),
        )
        return cls(begin, tuple(wire_view(weight, name) for name, weight in weights.items()))

    def messages(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[pb.UpdateWeightsRequest]:
        """Yield the push: one begin, full chunks and a last one, one commit."""
        yield pb.UpdateWeightsRequest(begin=self.begin)
        offset = 0
        for data in self._chunks(chunk_bytes):
            yield pb.UpdateWeightsRequest(chunk=pb.WeightsChunk(offset=offset, data=data))
            offset += len(data)
        yield pb.UpdateWeightsRequest(commit=pb.WeightsCommit(total_bytes=offset))

    def _chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        pending = bytearray()
        for view in self.views:
            start = 0
            while start < len(view):
                end = min(len(view), start + chunk_bytes - len(pending))
                pending += view[start:end]
                start = end
                if len(pending) == chunk_bytes:
                    yield bytes(pending)
                    pending.clear()
        if pending:
            yield bytes(pending)
