"""What a push says it brings, and whether that can be right. Knows neither gRPC, nor files, nor an engine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poise.errors import InvalidRequest
from poise.generation.served_policy import ServedPolicy
from poise.runtime.network.broadcast_group import Rendezvous
from poise.runtime.rpc.validation import quoted
from poise_client import combine_digests
from poise_client.codec import SAFETENSORS_DTYPES, max_block_bytes
from poise_client.types import Adapter

MAX_TENSORS = 65536
MAX_AXES = 8
MAX_PATH_BYTES = 4096
MAX_GROUP_TIMEOUT_S = 3600
_NAME = re.compile(r"[A-Za-z0-9._/-]{1,512}")


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """One parameter as announced."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: bytes
    num_changed: int = 0
    """Elements that differ from the base's, in a delta."""
    block_bytes: int = 0
    """Of what tells them, in a delta."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return SAFETENSORS_DTYPES[self.dtype][1]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.itemsize

    @property
    def form(self) -> tuple[str, str, tuple[int, ...]]:
        """What a delta leaves as it is."""
        return self.name, self.dtype, self.shape


@dataclass(frozen=True, slots=True)
class Announcement:
    """What opens a push."""

    policy: ServedPolicy
    """What is to be served."""
    tensors: tuple[ExpectedTensor, ...]
    base: ServedPolicy | None = None
    """What the push is a delta against; None for whole parameters."""
    file: str = ""
    """Where the body lies, if not in chunks."""
    keep: bool = False
    """Whether the sender would like to send a delta next time."""
    adapter: Adapter | None = None
    """What the parameters are, if an adapter's rather than the model's."""
    rendezvous: Rendezvous | None = None
    """Where the group meets that the body comes through, if it does."""
    timeout_s: float = 0.0
    """How long that may take."""

    @property
    def total_bytes(self) -> int:
        """Of all parameters, whole."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Sizes of what travels: of each parameter, or of what tells its changes."""
        return tuple(tensor.num_bytes if self.base is None else tensor.block_bytes for tensor in self.tensors)

    @property
    def body_bytes(self) -> int:
        """Of what travels."""
        return sum(self.part_bytes)


def policy_digest(tensors: Sequence[ExpectedTensor], adapter: Adapter | None = None) -> bytes:
    """Return the digest that generation.proto tells of."""
    return combine_digests({tensor.name: tensor.sha256 for tensor in tensors}, adapter)


def check_announcement(announced: Announcement, max_bytes: int) -> None:
    """Raise `InvalidRequest` for a push that cannot be right, before any byte of it is taken."""
    tensors = announced.tensors
    seen: set[str] = set()
    total = 0
    for index, tensor in enumerate(tensors):
        path = f"manifest.tensors[{index}]"
        if not _NAME.fullmatch(tensor.name):
            raise InvalidRequest.field(f"{path}.name", f"is {quoted(tensor.name)}; required: a state-dict name")
        if tensor.name in seen:
            raise InvalidRequest.field(f"{path}.name", f"{tensor.name} is announced twice")
        seen.add(tensor.name)
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise InvalidRequest.field(f"{path}.dtype", f"required: one of {', '.join(SAFETENSORS_DTYPES)}")
        if len(tensor.sha256) != 32:
            raise InvalidRequest.field(f"{path}.sha256", f"has {len(tensor.sha256)} bytes; required: 32")
        total += tensor.num_bytes
        if total > max_bytes:
            raise InvalidRequest.field(
                "manifest.tensors", f"hold {total} bytes; max_update_bytes is {max_bytes}, exceeded at {tensor.name}"
            )
        _check_changes(tensor, path, is_delta=announced.base is not None)
    if announced.policy.digest != policy_digest(tensors, announced.adapter):
        raise InvalidRequest.field("manifest.digest", "is not the SHA-256 over the tensors' sha256 in order of name")
    if announced.rendezvous is not None:
        if announced.file:
            raise InvalidRequest.field("manifest.file", "is set; the body comes through a group")
        if not 0 < announced.timeout_s <= MAX_GROUP_TIMEOUT_S:
            raise InvalidRequest.field(
                "manifest.process_group.timeout_s",
                f"is {announced.timeout_s:g}; required: above 0, at most {MAX_GROUP_TIMEOUT_S}",
            )
    if announced.adapter is not None and announced.base is not None:
        raise InvalidRequest.field("manifest.base", "is set; adapters come whole")


def check_sizes(num_axes: Sequence[int], file: str) -> None:
    """Raise `InvalidRequest` for too many tensors or axes, or too long a path. Call it before reading shapes."""
    if not 1 <= len(num_axes) <= MAX_TENSORS:
        raise InvalidRequest.field("manifest.tensors", f"has {len(num_axes)}; 1 to {MAX_TENSORS} are accepted")
    for index, number in enumerate(num_axes):
        if number > MAX_AXES:
            raise InvalidRequest.field(
                f"manifest.tensors[{index}].shape", f"has {number} axes; at most {MAX_AXES} are accepted"
            )
    if len(file) > MAX_PATH_BYTES or "\0" in file:
        raise InvalidRequest.field(
            "manifest.file", f"is {quoted(file)}; required: a path of at most {MAX_PATH_BYTES} characters, without NUL"
        )


def check_weights(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InvalidRequest` naming every parameter that is missing, unknown, or of another shape."""
    problems = [f"{name} is missing" for name in expected.keys() - given.keys()]
    problems += [f"{name} is no parameter of this model" for name in given.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(given[name])}, the model's has {list(expected[name])}"
        for name in expected.keys() & given.keys()
        if given[name] != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InvalidRequest.field("tensors", "; ".join(sorted(problems)[:5]) + more)


def _check_changes(tensor: ExpectedTensor, path: str, *, is_delta: bool) -> None:
    num_elements = math.prod(tensor.shape) if is_delta else 0
    if tensor.num_changed > num_elements:
        raise InvalidRequest.field(
            f"{path}.num_changed", f"is {tensor.num_changed}; required: at most {num_elements}, and 0 but in a delta"
        )
    limit = max_block_bytes(tensor.num_changed, tensor.itemsize) if tensor.num_changed else 0
    if tensor.block_bytes > limit:
        raise InvalidRequest.field(
            f"{path}.block_bytes", f"is {tensor.block_bytes}; {tensor.num_changed} changes take at most {limit}"
        )
