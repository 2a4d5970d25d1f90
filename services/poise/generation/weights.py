"""A push of weights on its way in: collected into a safetensors file, every byte checked, before any engine sees it.

Knows neither gRPC nor an engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from poise.errors import BackendDown, InvalidRequest

SAFETENSORS_DTYPES = {"float32": ("F32", 4), "float64": ("F64", 8), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Element types that travel, with their safetensors names and sizes in bytes."""

MAX_TENSORS = 65536
_PREFIX, _SUFFIX = "poise-weights-", ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9._/-]{1,512}")


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """One parameter as announced."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: bytes

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype][1]


def policy_digest(tensors: Sequence[ExpectedTensor]) -> bytes:
    """Return SHA-256 over the tensors' SHA-256 in order of name."""
    return hashlib.sha256(b"".join(tensor.sha256 for tensor in sorted(tensors, key=lambda t: t.name))).digest()


def check_announcement(tensors: Sequence[ExpectedTensor], max_bytes: int) -> None:
    """Raise `InvalidRequest` for a push that cannot be right, before any byte of it is taken."""
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise InvalidRequest.field("begin.tensors", f"has {len(tensors)}; 1 to {MAX_TENSORS} are accepted")
    seen: set[str] = set()
    for index, tensor in enumerate(tensors):
        path = f"begin.tensors[{index}]"
        if not _NAME.fullmatch(tensor.name):
            raise InvalidRequest.field(f"{path}.name", f"is {tensor.name[:60]!r}; required: a state-dict name")
        if tensor.name in seen:
            raise InvalidRequest.field(f"{path}.name", f"{tensor.name} is announced twice")
        seen.add(tensor.name)
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise InvalidRequest.field(f"{path}.dtype", f"required: one of {', '.join(SAFETENSORS_DTYPES)}")
        if len(tensor.sha256) != 32:
            raise InvalidRequest.field(f"{path}.sha256", f"has {len(tensor.sha256)} bytes; required: 32")
    total = sum(tensor.num_bytes for tensor in tensors)
    if total > max_bytes:
        raise InvalidRequest.field("begin.tensors", f"hold {total} bytes; max_update_bytes is {max_bytes}")


class StagedWeights:
    """The file being filled. Use as a context manager: it is deleted at the end, applied or not."""

    def __init__(self, tensors: Sequence[ExpectedTensor], folder: Path) -> None:
        self._tensors = tensors
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._received = 0
        self._index = 0
        self._in_tensor = 0
        self._hash = hashlib.sha256()
        self.total_bytes = sum(tensor.num_bytes for tensor in tensors)

    def __enter__(self) -> StagedWeights:
        header = json.dumps(self._header()).encode()
        header += b" " * (-len(header) % 8)
        with self._storing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = _create_locked(self._folder)
            try:
                self._file.write(len(header).to_bytes(8, "little") + header)
            except OSError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        assert self._file is not None  # noqa: S101 (entered)
        with contextlib.suppress(OSError):  # of a full disk: what it had no room for is not wanted any more
            self._file.close()

    @property
    def path(self) -> Path:
        """The file."""
        assert self._file is not None  # noqa: S101 (entered)
        return Path(self._file.name)

    def write(self, offset: int, data: bytes) -> None:
        """Append a chunk.

        Raises:
            InvalidRequest: it does not follow, exceeds what was announced, or completes a damaged tensor.
            BackendDown: there is no room for it.
        """
        assert self._file is not None  # noqa: S101 (entered)
        if offset != self._received:
            raise InvalidRequest.field("chunk.offset", f"is {offset}; {self._received} bytes were received so far")
        if self._received + len(data) > self.total_bytes:
            raise InvalidRequest.field("chunk.data", f"exceeds the {self.total_bytes} bytes announced")
        with self._storing():
            self._file.write(data)
        self._received += len(data)
        rest = memoryview(data)
        while rest:
            tensor = self._tensors[self._index]
            take = min(len(rest), tensor.num_bytes - self._in_tensor)
            self._hash.update(rest[:take])
            self._in_tensor += take
            rest = rest[take:]
            if self._in_tensor == tensor.num_bytes:
                self._close_tensor(tensor)

    def finish(self, total_bytes: int) -> None:
        """Check that all was received, and make it readable by others. Raises as `write` does."""
        assert self._file is not None  # noqa: S101 (entered)
        if total_bytes != self.total_bytes or self._received != self.total_bytes:
            raise InvalidRequest.field(
                "commit.total_bytes",
                f"is {total_bytes}; {self.total_bytes} were announced and {self._received} received",
            )
        with self._storing():
            self._file.flush()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendDown(
                f"the push cannot be stored in {self._folder}: {error.strerror}",
                remedy=f"It takes {self.total_bytes} bytes: make room for them, or name another staging_dir.",
            ) from error

    def _close_tensor(self, tensor: ExpectedTensor) -> None:
        if self._hash.digest() != tensor.sha256:
            raise InvalidRequest.field(
                f"begin.tensors[{self._index}].sha256", f"does not match the bytes received of {tensor.name}"
            )
        self._index += 1
        self._in_tensor = 0
        self._hash = hashlib.sha256()

    def _header(self) -> dict[str, object]:
        header: dict[str, object] = {}
        offset = 0
        for tensor in self._tensors:
            end = offset + tensor.num_bytes
            dtype = SAFETENSORS_DTYPES[tensor.dtype][0]
            header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        return header


def _create_locked(folder: Path) -> IO[bytes]:
    """Create a file that stays locked for as long as this process has it open."""
    while True:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=_PREFIX, suffix=_SUFFIX, delete=False)  # noqa: SIM115 (kept)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # a process that was starting took it for a leftover, before it was locked


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that are gone left behind in a staging folder.

    A lock tells who is gone, for it ends with its process. A process id would not: in a container that was killed and
    started again it is the same one.
    """
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a push is being received into it
            path.unlink()


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
