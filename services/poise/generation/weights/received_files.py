"""A file being filled with the parameters of a push: whole, of what changed, or linked; every byte is checked.

Knows neither gRPC nor an engine. Its methods block: they read, hash and write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from poise.errors import BackendDown, InvalidRequest
from poise.generation.served_policy import ServedPolicy
from poise.generation.weights.capacity import refuse_unless_room
from poise.generation.weights.manifest import Announcement, ExpectedTensor
from poise.runtime.files.scratch import ScratchFolder
from poise_client.codec import CodecError, apply_delta, safetensors_header

_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Base:
    """The weights that are served, kept for a delta to build on."""

    policy: ServedPolicy
    tensors: tuple[ExpectedTensor, ...]
    path: Path
    """A safetensors file, which nobody changes."""


class StagedWeights:
    """The file being filled with whole parameters. Deleted at the end of the context, applied or not, unless kept."""

    def __init__(self, announced: Announcement, folder: ScratchFolder, source: Path | None = None) -> None:
        self._tensors = announced.tensors
        self._body_bytes, self._total_bytes = announced.body_bytes, announced.total_bytes
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._received = 0
        self._index = 0
        self._in_tensor = 0
        self._hash = hashlib.sha256()
        self._kept = False
        self.source = source
        """A file that holds the body, to be read by `read_source`; None where it is to be written."""

    def __enter__(self) -> Self:
        with self._storing():
            self._file = tempfile.NamedTemporaryFile(dir=self._folder.ensure(), suffix=".safetensors", delete=False)
            try:
                self._begin()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._kept:
            self.path.unlink(missing_ok=True)
        assert self._file is not None  # noqa: S101 (entered)
        with contextlib.suppress(OSError):  # of a full disk: what it had no room for is not wanted any more
            self._file.close()

    @property
    def path(self) -> Path:
        """The file."""
        assert self._file is not None  # noqa: S101 (entered)
        return Path(self._file.name)

    def keep(self) -> Path:
        """Leave the file to the caller."""
        self._kept = True
        return self.path

    def write(self, offset: int, data: bytes) -> None:
        """Append a part of the body.

        Raises:
            InvalidRequest: it does not follow, exceeds what was announced, or completes a damaged tensor.
            BackendDown: there is no room for it.
        """
        if offset != self._received:
            raise InvalidRequest.field("chunk.offset", f"is {offset}; {self._received} bytes were received so far")
        if self._received + len(data) > self._body_bytes:
            raise InvalidRequest.field("chunk.data", f"exceeds the {self._body_bytes} bytes announced")
        self._received += len(data)
        self._take(data)

    def read_source(self) -> None:
        """Take the whole body from `source`. Raises as `write` does."""
        assert self.source is not None  # noqa: S101 (a file was announced)
        with _reading(self.source), self.source.open("rb") as file:
            while data := file.read(_READ_BYTES):
                self.write(self._received, data)

    def finish(self, total_bytes: int) -> None:
        """Check that all was received, and make it readable by others. Raises as `write` does."""
        if total_bytes != self._body_bytes or self._received != self._body_bytes:
            raise InvalidRequest.field(
                "commit.total_bytes",
                f"is {total_bytes}; {self._body_bytes} were announced and {self._received} received",
            )
        self._end()

    def _begin(self) -> None:
        assert self._file is not None  # noqa: S101 (entered)
        refuse_unless_room(self._folder.parent, self._total_bytes)
        self._file.write(safetensors_header(tensor.form for tensor in self._tensors))

    def _take(self, data: bytes) -> None:
        self._append(memoryview(data))

    def _end(self) -> None:
        assert self._file is not None  # noqa: S101 (entered)
        with self._storing():
            self._file.flush()

    def _append(self, data: memoryview) -> None:
        """Store the next bytes of the parameters, and check them."""
        assert self._file is not None  # noqa: S101 (entered)
        with self._storing():
            self._file.write(data)
        self._check(data)

    def _check(self, data: memoryview) -> None:
        """Hash the next bytes of the parameters, and refuse the first that they complete and that is damaged."""
        while data:
            tensor = self._tensors[self._index]
            take = min(len(data), tensor.num_bytes - self._in_tensor)
            self._hash.update(data[:take])
            self._in_tensor += take
            data = data[take:]
            if self._in_tensor == tensor.num_bytes:
                self._close_tensor(tensor)

    def _close_tensor(self, tensor: ExpectedTensor) -> None:
        if self._hash.digest() != tensor.sha256:
            raise InvalidRequest.field(
                f"manifest.tensors[{self._index}].sha256", f"does not match the bytes received of {tensor.name}"
            )
        self._index += 1
        self._in_tensor = 0
        self._hash = hashlib.sha256()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendDown(
                f"the push cannot be stored in {self._folder.parent}: {error.strerror}",
                remedy=f"It takes {self._total_bytes} bytes: make room for them, or name another staging_dir.",
            ) from error


class StagedDelta(StagedWeights):
    """The file being filled from a base and what changed since, parameter by parameter."""

    def __init__(self, announced: Announcement, folder: ScratchFolder, source: Path | None, base: Base) -> None:
        super().__init__(announced, folder, source)
        self._base_tensors = base.tensors
        self._base_path = base.path
        self._base = memoryview(b"")
        self._base_offset = len(safetensors_header(tensor.form for tensor in base.tensors))
        self._block = bytearray()
        """What came of the block of the parameter at `_index`."""

    def _begin(self) -> None:
        super()._begin()
        with self._base_path.open("rb") as file:
            self._base = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def _take(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._rebuild_unchanged()
            tensor = self._tensors[self._index]
            take = min(len(rest), tensor.block_bytes - len(self._block))
            self._block += rest[:take]
            rest = rest[take:]
            if len(self._block) == tensor.block_bytes:
                self._rebuild(tensor)

    def _end(self) -> None:
        self._rebuild_unchanged()
        super()._end()

    def _rebuild_unchanged(self) -> None:
        while self._index < len(self._tensors) and not self._tensors[self._index].block_bytes:
            self._rebuild(self._tensors[self._index])

    def _rebuild(self, tensor: ExpectedTensor) -> None:
        field = f"manifest.tensors[{self._index}]"
        end = self._base_offset + tensor.num_bytes
        content = bytearray(self._base[self._base_offset : end])
        try:
            apply_delta(content, self._block, tensor.num_changed, tensor.itemsize, field)
        except CodecError as error:
            raise InvalidRequest.field(error.field, f"the block of {tensor.name} {error.description}") from error
        self._base_offset = end
        self._block = bytearray()
        self._append(memoryview(content))
        if not content:
            self._close_tensor(tensor)


class LinkedWeights(StagedWeights):
    """A file of whole parameters that another process wrote: linked rather than copied, where both lie on one disk."""

    def read_source(self) -> None:
        """Make the file one's own, and check every byte. Raises as `write` does."""
        assert self.source is not None  # noqa: S101 (given)
        header = safetensors_header(tensor.form for tensor in self._tensors)
        with _reading(self.source):
            self._refuse_unless(self.source.stat().st_size == len(header) + self._total_bytes)
            self._link(self.source)
        with self.path.open("rb") as file:
            self._refuse_unless(os.fstat(file.fileno()).st_size == len(header) + self._total_bytes)
            self._refuse_unless(file.read(len(header)) == header)
            while data := file.read(_READ_BYTES):
                self._check(memoryview(data))
        self._received = self._total_bytes

    def _begin(self) -> None:
        """Write nothing: the file comes whole."""

    def _refuse_unless(self, right: bool) -> None:
        if not right:
            raise InvalidRequest.field("manifest.file", f"{self.source} is not the safetensors file that was announced")

    def _link(self, source: Path) -> None:
        self.path.unlink()
        try:
            os.link(source, self.path)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            with self._storing():
                refuse_unless_room(self._folder.parent, self._total_bytes)
                shutil.copyfile(source, self.path)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest.field("manifest.file", f"{source} cannot be read: {error.strerror}") from error
