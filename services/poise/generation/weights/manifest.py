"""The manifest of a weight push, and all checks that do not need the payload.

`staging` checks the payload's bytes. The engine checks names and shapes against the model, with `check_shapes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from poise.errors import InvalidRequest, VersionMismatch
from poise.generation.config import GenerationConfig
from poise.generation.served_policy import ServedPolicy
from poise.runtime.rpc.validation import Violations, quoted
from poise_client import combine_digests
from poise_client.codec import (
    SAFETENSORS_DTYPES,
    CodecError,
    decode,
    max_block_bytes,
    safetensors_header,
)
from poise_client.types import Adapter
from poise_proto.v1 import generation_pb2 as pb

MAX_TENSORS = 65536
MAX_AXES = 8
MAX_PATH_CHARS = 4096
MAX_GROUP_TIMEOUT_S = 3600
_MAX_PROBLEMS = 5
"""Limit on the tensors that an error about shapes lists; it counts the others."""
_NAME = re.compile(r"[A-Za-z0-9._/-]{1,512}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter of a push."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: bytes
    num_changed: int = 0
    """Elements that differ from the base; 0 except in a delta."""
    block_bytes: int = 0
    """Size of the block that encodes these changes; 0 except in a delta."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return SAFETENSORS_DTYPES[self.dtype][1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole parameter."""
        return math.prod(self.shape) * self.itemsize

    @property
    def layout(self) -> tuple[str, str, tuple[int, ...]]:
        """Name, dtype and shape, which a delta must share with its base."""
        return self.name, self.dtype, self.shape


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The group of sender and replica that transfers the payload of a push."""

    backend: str = ""
    rendezvous: bytes = b""
    timeout_s: float = 0.0
    """Maximum time of the transfer."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The first message of a push, which describes it completely. Fields are those of `WeightsManifest`."""

    lineage_id: str
    policy_version: int
    tensors: tuple[TensorSpec, ...]
    digest: bytes
    base: ServedPolicy | None = None
    """The version that a delta builds on; None for a full push."""
    adapter: Adapter | None = None
    """Rank, scale and base of a low-rank adapter; None for the model's own parameters."""
    keep_as_base: bool = False
    """Whether the sender may send a delta against this version next."""
    file: str = ""
    """Path of the payload; empty if it comes in chunks or through a group."""
    process_group: ProcessGroup | None = None

    @property
    def policy(self) -> ServedPolicy:
        """The version to serve."""
        return ServedPolicy(self.lineage_id, self.policy_version, self.digest)

    @property
    def total_bytes(self) -> int:
        """Size of all parameters, decoded."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Size of each tensor's part of the payload: the whole parameter, or its block of a delta."""
        return tuple(tensor.num_bytes if self.base is None else tensor.block_bytes for tensor in self.tensors)

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return sum(self.part_bytes)

    @property
    def header(self) -> bytes:
        """The header of a safetensors file that holds the whole parameters in this order."""
        return safetensors_header(tensor.layout for tensor in self.tensors)


def read_manifest(
    message: pb.WeightsManifest, config: GenerationConfig, *, base_digest: bytes = b"", group_backend: str = ""
) -> Manifest:
    """Return the checked manifest of a push.

    Args:
        message: the first message of the push.
        config: the settings of this replica.
        base_digest: digest of the model that adapters are served over.
        group_backend: backend of the groups that the engine can join; empty for none.

    Raises:
        InvalidRequest: a field is wrong, or this replica does not accept such pushes.
        VersionMismatch: the adapter was trained on another model.
    """
    _check_sizes(message)
    try:
        manifest = decode(message, Manifest, "manifest")
    except CodecError as error:
        raise InvalidRequest.field(error.field, error.description) from error
    _check_tensors(manifest, config.max_update_bytes)
    _check_adapter(manifest, config, base_digest)
    _check_group(manifest, group_backend)
    return manifest


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InvalidRequest` that lists the parameters that are missing, unknown or of another shape."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not a parameter of this model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(found[name])}; required: {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise InvalidRequest.field(
            "tensors",
            "; ".join(sorted(problems)[:_MAX_PROBLEMS]) + more,
            remedy="Start the learner and this replica from the same model.",
        )


def _check_sizes(message: pb.WeightsManifest) -> None:
    """Check the lengths of all lists and texts. Must run before the shapes are read."""
    wrong = Violations()
    wrong.identifier("manifest.lineage_id", message.lineage_id)
    wrong.check_count("manifest.tensors", len(message.tensors), MAX_TENSORS, at_least=1)
    for index, tensor in enumerate(message.tensors):
        if len(tensor.shape) > MAX_AXES:
            wrong.add(f"manifest.tensors[{index}].shape", f"has {len(tensor.shape)} axes; required: at most {MAX_AXES}")
            break
    if len(message.file) > MAX_PATH_CHARS or "\0" in message.file:
        wrong.add(
            "manifest.file",
            f"is {quoted(message.file)}; required: at most {MAX_PATH_CHARS} characters, none of them NUL",
        )
    wrong.raise_if_any()


def _check_tensors(manifest: Manifest, max_bytes: int) -> None:
    seen: set[str] = set()
    total = 0
    for index, tensor in enumerate(manifest.tensors):
        path = f"manifest.tensors[{index}]"
        if not _NAME.fullmatch(tensor.name):
            raise InvalidRequest.field(
                f"{path}.name", f"is {quoted(tensor.name)}; required: 1 to 512 characters of A-Z a-z 0-9 . _ / -"
            )
        if tensor.name in seen:
            raise InvalidRequest.field(
                f"{path}.name", f"is {tensor.name}, which an earlier tensor has too; required: unique"
            )
        seen.add(tensor.name)
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise InvalidRequest.field(
                f"{path}.dtype", f"is unset or not supported; required: one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        if len(tensor.sha256) != 32:
            raise InvalidRequest.field(f"{path}.sha256", f"has {len(tensor.sha256)} bytes; required: 32")
        total += tensor.num_bytes
        if total > max_bytes:
            raise InvalidRequest.field(
                "manifest.tensors",
                f"have {total} bytes up to {tensor.name}; required: at most {max_bytes} (max_update_bytes)",
                remedy="Raise max_update_bytes of the generation service.",
            )
        _check_delta(tensor, path, is_delta=manifest.base is not None)
    if manifest.digest != combine_digests(
        {tensor.name: tensor.sha256 for tensor in manifest.tensors}, manifest.adapter
    ):
        raise InvalidRequest.field("manifest.digest", "is not the SHA-256 over the tensors' sha256 in order of name")


def _check_delta(tensor: TensorSpec, path: str, *, is_delta: bool) -> None:
    num_elements = math.prod(tensor.shape) if is_delta else 0
    if tensor.num_changed > num_elements:
        raise InvalidRequest.field(
            f"{path}.num_changed",
            f"is {tensor.num_changed}; required: at most {num_elements}"
            + ("" if is_delta else ", because `base` is unset, so the push is not a delta"),
        )
    max_bytes = max_block_bytes(tensor.num_changed, tensor.itemsize) if tensor.num_changed else 0
    if tensor.block_bytes > max_bytes:
        raise InvalidRequest.field(
            f"{path}.block_bytes",
            f"is {tensor.block_bytes}; required: at most {max_bytes} for {tensor.num_changed} changed elements",
        )


def _check_adapter(manifest: Manifest, config: GenerationConfig, base_digest: bytes) -> None:
    """Check that a push to a replica with `lora` is an adapter for its model, and to others the model's parameters."""
    adapter = manifest.adapter
    if config.lora is None:
        if adapter is not None:
            raise InvalidRequest.field(
                "manifest.adapter",
                "is set, but `lora` is unset on this replica, which serves the model's own parameters",
                remedy="Set `lora` of the generation service, or choose another push.transport of the learner.",
            )
        return
    if adapter is None:
        raise InvalidRequest.field(
            "manifest.adapter",
            "is unset, but `lora` is set on this replica, which serves adapters only",
            remedy="Set push.transport of the learner to `lora`, or unset `lora` of the generation service.",
        )
    if manifest.base is not None:
        raise InvalidRequest.field("manifest.base", "is set; required: unset, because adapters are sent whole")
    if not 1 <= adapter.rank <= config.lora.max_rank:
        raise InvalidRequest.field(
            "manifest.adapter.rank", f"is {adapter.rank}; required: 1 to {config.lora.max_rank} (lora.max_rank)"
        )
    if not (math.isfinite(adapter.alpha) and adapter.alpha > 0):
        raise InvalidRequest.field("manifest.adapter.alpha", f"is {adapter.alpha:g}; required: above 0 and finite")
    if adapter.base_digest != base_digest:
        raise VersionMismatch(
            f"the adapter was trained on the model with digest {adapter.base_digest.hex()[:16]}; this replica serves "
            f"{config.model} with digest {base_digest.hex()[:16]}",
            remedy="Start the replica and the learner from the same model.",
        )


def _check_group(manifest: Manifest, group_backend: str) -> None:
    group = manifest.process_group
    if group is None:
        return
    if manifest.file:
        raise InvalidRequest.field(
            "manifest.file", "is set; required: unset, because `process_group` sends the payload"
        )
    if not 0 < group.timeout_s <= MAX_GROUP_TIMEOUT_S:
        raise InvalidRequest.field(
            "manifest.process_group.timeout_s",
            f"is {group.timeout_s:g}; required: above 0, at most {MAX_GROUP_TIMEOUT_S}",
        )
    if not group_backend:
        raise InvalidRequest.field(
            "manifest.process_group",
            "is set, but `nccl` is unset on this replica",
            remedy="Set `nccl` of the generation service, or choose another push.transport of the learner.",
        )
    if group.backend != group_backend:
        raise InvalidRequest.field(
            "manifest.process_group.backend", f"is {quoted(group.backend)}; required: {group_backend}"
        )
