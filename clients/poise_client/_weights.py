"""Weight pushes: digests of parameters, full pushes and deltas, and their messages."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from poise_client.codec import (
    DTYPE_NAMES,
    DTYPE_NUMBERS,
    MAX_DELTA_ELEMENTS,
    SAFETENSORS_DTYPES,
    CodecError,
    backend_number,
    encode,
    host_dtype,
    make_delta,
    safetensors_header,
)
from poise_client.types import Adapter, WeightArray
from poise_proto.v1 import generation_pb2 as pb

CHUNK_BYTES = 2**20
"""Size of the chunks of a payload."""

MAX_CHANGED_SHARE = 0.25
"""Above this share of changed elements a full push is sent: a delta would save little and take long to create."""

_MAX_THREADS = 4

T = TypeVar("T")
R = TypeVar("R")


def wire_view(weight: WeightArray, name: str) -> memoryview:
    """Return the bytes of a parameter, little-endian in C order. Copy only if the array has another layout.

    Raises:
        CodecError: the element type of the array differs from `weight.dtype`.
    """
    if weight.dtype not in SAFETENSORS_DTYPES or weight.array.dtype != host_dtype(weight.dtype):
        raise CodecError(
            f"weights[{name!r}]",
            f"is an array of {weight.array.dtype.name} with dtype {weight.dtype!r}; required: float32, float64, "
            "float16, or bfloat16 as raw uint16 bits",
        )
    little = weight.array.astype(weight.array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8).data


def hash_weights(weights: Mapping[str, WeightArray]) -> dict[str, bytes]:
    """Return the SHA-256 of each parameter. It hashes every byte, in about half a second per GB and core.

    Raises:
        CodecError: the element type of an array differs from its `dtype`.
    """
    views = [wire_view(weight, name) for name, weight in weights.items()]
    return dict(zip(weights, _in_threads(_sha256, views), strict=True))


def combine_digests(sha256_by_name: Mapping[str, bytes], adapter: Adapter | None = None) -> bytes:
    """Return the digest of a policy: SHA-256 over the SHA-256 of its parameters, ordered by name.

    For an adapter, the hash also covers the digest of its base, its rank and its alpha.
    """
    content = b"".join(sha256_by_name[name] for name in sorted(sha256_by_name))
    if adapter is not None:
        content += adapter.base_digest + struct.pack("<Id", adapter.rank, adapter.alpha)
    return hashlib.sha256(content).digest()


def weights_digest(weights: Mapping[str, WeightArray]) -> bytes:
    """Return the digest of parameters, 32 bytes, as in `Policy.digest`. It hashes every byte.

    Raises:
        CodecError: the element type of an array differs from its `dtype`.
    """
    return combine_digests(hash_weights(weights))


@dataclass(frozen=True, slots=True)
class WeightPush:
    """One prepared version of a policy: hashed once, then sent to any number of replicas."""

    manifest: pb.WeightsManifest
    """The first message of the push. Do not change it."""
    payload: tuple[memoryview, ...]
    """The bytes of each parameter in the order of the manifest; in a delta, the blocks of the changed parameters."""

    @classmethod
    def prepare(
        cls,
        lineage_id: str,
        policy_version: int,
        weights: Mapping[str, WeightArray],
        *,
        sha256_by_name: Mapping[str, bytes] | None = None,
        keep_as_base: bool = False,
        adapter: Adapter | None = None,
    ) -> WeightPush:
        """Return a full push.

        Args:
            lineage_id: id of the learner that numbers the versions.
            policy_version: must exceed the served version of the same lineage.
            weights: every parameter by its Hugging Face name, tied ones once. Do not change them while in use.
            sha256_by_name: result of `hash_weights`. None calls it, which blocks for a while.
            keep_as_base: ask replicas to keep these weights as the base of a later `delta`.
            adapter: the adapter of these `weights`, which are then named as in peft's files; None for a whole model.

        Raises:
            CodecError: the element type of an array differs from its `dtype`.
        """
        if sha256_by_name is None:
            sha256_by_name = hash_weights(weights)
        manifest = pb.WeightsManifest(
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
            digest=combine_digests(sha256_by_name, adapter),
            keep_as_base=keep_as_base,
            adapter=None if adapter is None else encode(adapter, pb.WeightsAdapter),
        )
        return cls(manifest, tuple(wire_view(weight, name) for name, weight in weights.items()))

    @property
    def is_delta(self) -> bool:
        """Whether the push contains only the changes since `manifest.base`."""
        return self.manifest.HasField("base")

    @property
    def payload_bytes(self) -> int:
        """Size of the payload in bytes."""
        return sum(len(part) for part in self.payload)

    def delta(self, base: WeightPush) -> WeightPush | None:
        """Return this push as a delta to `base`; None if it saves too little or names, dtypes or shapes differ.

        It compares every byte, which blocks for a while.

        Raises:
            ValueError: one of the pushes is a delta itself.
        """
        if self.is_delta or base.is_delta:
            raise ValueError("a delta needs two full pushes, but one of them is a delta")
        if [_signature(tensor) for tensor in self.manifest.tensors] != [
            _signature(tensor) for tensor in base.manifest.tensors
        ]:
            return None
        sizes = [SAFETENSORS_DTYPES[DTYPE_NAMES[tensor.dtype]][1] for tensor in self.manifest.tensors]
        triples = list(zip(base.payload, self.payload, sizes, strict=True))
        counts = [len(new) // size for _, new, size in triples]
        if max(counts, default=0) > MAX_DELTA_ELEMENTS:
            return None
        if sum(_in_threads(_num_changed, triples)) > MAX_CHANGED_SHARE * sum(counts):
            return None
        manifest, payload = pb.WeightsManifest(), []
        manifest.CopyFrom(self.manifest)
        manifest.base.lineage_id, manifest.base.policy_version = base.manifest.lineage_id, base.manifest.policy_version
        manifest.base.digest = base.manifest.digest
        for tensor, (num_changed, block) in zip(manifest.tensors, _in_threads(_encode, triples), strict=True):
            tensor.num_changed, tensor.block_bytes = num_changed, len(block)
            payload.append(memoryview(block))
        return WeightPush(manifest, tuple(payload))

    def in_file(self, path: str) -> WeightPush:
        """Return this push with its payload in a file, which must contain `file_parts`."""
        manifest = pb.WeightsManifest()
        manifest.CopyFrom(self.manifest)
        manifest.file = path
        return WeightPush(manifest, self.payload)

    def through_group(self, backend: str, rendezvous: bytes, timeout_s: float) -> WeightPush:
        """Return this push with its payload sent through a process group: see `ProcessGroup` in generation.proto."""
        manifest = pb.WeightsManifest()
        manifest.CopyFrom(self.manifest)
        manifest.process_group.backend = backend_number(backend)
        manifest.process_group.rendezvous, manifest.process_group.timeout_s = rendezvous, timeout_s
        return WeightPush(manifest, self.payload)

    def file_parts(self) -> Iterator[bytes | memoryview]:
        """Yield the content of the payload's file: a safetensors file, or the blocks of a delta."""
        if not self.is_delta:
            yield safetensors_header((t.name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for t in self.manifest.tensors)
        yield from self.payload

    def messages(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[pb.UpdateWeightsRequest]:
        """Yield the messages of the push: the manifest, any chunks, the commit."""
        yield pb.UpdateWeightsRequest(manifest=self.manifest)
        offset = 0
        has_own_transport = self.manifest.file or self.manifest.HasField("process_group")
        for data in [] if has_own_transport else self._chunks(chunk_bytes):
            request = pb.UpdateWeightsRequest()  # filled in place: protobuf copies nested messages
            request.chunk.offset, request.chunk.data = offset, data
            yield request
            offset += len(data)
        yield pb.UpdateWeightsRequest(commit=pb.WeightsCommit(total_bytes=self.payload_bytes))

    def _chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        pending: list[memoryview] = []
        num_pending = 0
        for part in self.payload:
            start = 0
            while start < len(part):
                end = min(len(part), start + chunk_bytes - num_pending)
                pending.append(part[start:end])
                num_pending += end - start
                start = end
                if num_pending == chunk_bytes:
                    yield b"".join(pending)
                    pending, num_pending = [], 0
        if pending:
            yield b"".join(pending)


def _sha256(view: memoryview) -> bytes:
    return hashlib.sha256(view).digest()


def _signature(tensor: pb.WeightTensor) -> tuple[str, int, tuple[int, ...]]:
    return tensor.name, tensor.dtype, tuple(tensor.shape)


def _num_changed(triple: tuple[memoryview, memoryview, int]) -> int:
    base, new, size = triple
    return int(np.count_nonzero(np.frombuffer(base, f"<u{size}") != np.frombuffer(new, f"<u{size}")))


def _encode(triple: tuple[memoryview, memoryview, int]) -> tuple[int, bytes]:
    return make_delta(*triple)


def _in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `work` to each item in threads. It must release the GIL most of the time."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="poise_client") as pool:
        return list(pool.map(work, items))
