"""The files of weight pushes: the one being received, the base of the next delta, and the adapter being served.

`StagedPush` checks every byte against the manifest. All methods block: they read, hash and write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from poise.errors import BackendDown, InvalidRequest, VersionMismatch
from poise.generation.served_policy import ServedPolicy
from poise.generation.weights.capacity import check_free_space, choose_folder, staging_folders
from poise.generation.weights.manifest import Manifest, TensorSpec
from poise.generation.weights.process_group import GroupPayload
from poise.runtime.files.scratch import ScratchFolder, remove_leftovers
from poise.runtime.network.broadcast_group import Rendezvous
from poise.runtime.rpc.validation import quoted
from poise_client.codec import CodecError, apply_delta

_PREFIX = "poise-weights-"
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class DeltaBase:
    """The served weights, kept so that the next push can be a delta."""

    manifest: Manifest
    path: Path
    """A safetensors file, never modified."""


class Staging:
    """The staging folders of this process. Close it when the process ends."""

    def __init__(self, configured: Path | None, *, keep_base: bool, shared_dirs: Sequence[Path]) -> None:
        self._folders = {path: ScratchFolder(path, _PREFIX) for path in staging_folders(configured)}
        self._keep_base = keep_base
        self._shared_dirs = shared_dirs
        self._adapter: Path | None = None
        """Folder of the adapter being served."""
        self.folder = next(iter(self._folders.values()))
        """The folder of the last push."""
        self.base: DeltaBase | None = None
        """The weights that the next delta can build on; None if none are kept."""

    def remove_leftovers(self) -> None:
        """Remove the files of killed processes. Call it when the process starts."""
        for parent in self._folders:
            remove_leftovers(parent, _PREFIX)

    def close(self) -> None:
        """Remove all files. Safe to call twice."""
        self.base = None
        for folder in self._folders.values():
            folder.close()

    def open(self, manifest: Manifest) -> StagedPush:
        """Return a context manager for the file that receives a push.

        Raises:
            VersionMismatch: the base of a delta is not kept here.
            InvalidRequest: the push names a file outside `shared_dirs`, or a delta has other tensors than its base.
        """
        base = None if manifest.base is None else self._matching_base(manifest, manifest.base)
        shared_file = self._shared_file(manifest.file) if manifest.file else None
        if base is None:
            # Whole parameters replace the base, whose space they may need.
            self.drop_base()
            self.folder = self._folders[choose_folder(tuple(self._folders), manifest.total_bytes)]
        return StagedPush(manifest, self.folder, base=base, shared_file=shared_file)

    def applied(self, push: StagedPush, adapter: Path | None = None) -> None:
        """Keep the files that an applied push still needs: an adapter's folder, or the base of the next delta.

        Keeps a base only if the sender wants it and the next version fits beside it.
        """
        if adapter is not None:
            if self._adapter is not None:
                shutil.rmtree(self._adapter, ignore_errors=True)
            self._adapter = adapter
            return
        self.drop_base()
        is_wanted = self._keep_base and push.manifest.keep_as_base
        if is_wanted and shutil.disk_usage(push.path.parent).free >= push.manifest.total_bytes:
            self.base = DeltaBase(push.manifest, push.keep())

    def drop_base(self) -> None:
        """Remove the base: the next push must contain whole parameters."""
        if self.base is not None:
            self.base.path.unlink(missing_ok=True)
            self.base = None

    def _matching_base(self, manifest: Manifest, wanted: ServedPolicy) -> DeltaBase:
        if self.base is None or self.base.manifest.policy != wanted:
            kept = "no version" if self.base is None else f"version {self.base.manifest.policy.policy_version}"
            raise VersionMismatch(
                f"the push is a delta against version {wanted.policy_version}, but {kept} is kept here",
                remedy="Push whole parameters.",
            )
        if [tensor.layout for tensor in self.base.manifest.tensors] != [tensor.layout for tensor in manifest.tensors]:
            raise InvalidRequest.field(
                "manifest.tensors",
                "differ in name, dtype, shape or order from those of the base",
                remedy="Push whole parameters.",
            )
        return self.base

    def _shared_file(self, file: str) -> Path:
        """Return the file that a push names, with links resolved, if it is within `shared_dirs`."""
        try:
            path = Path(os.path.realpath(file))
            is_allowed = any(path.is_relative_to(os.path.realpath(folder)) for folder in self._shared_dirs)
            is_file = is_allowed and path.is_file()
        except (OSError, ValueError) as error:  # such as a name that is too long for the disk
            raise InvalidRequest.field("manifest.file", f"{quoted(file)} cannot be read: {error}") from error
        if not Path(file).is_absolute() or not is_allowed:
            allowed = ", ".join(map(str, self._shared_dirs)) or "shared_dirs is empty"
            raise InvalidRequest.field(
                "manifest.file",
                f"is {quoted(file)}; required: an absolute path within shared_dirs of this replica ({allowed})",
            )
        if not is_file:
            raise InvalidRequest.field(
                "manifest.file",
                f"is {quoted(str(path))}, which is not a file on this host",
                remedy="Run the learner and the replica on the same host, or choose another push.transport.",
            )
        return path


class StagedPush:
    """The file of one push, filled and checked byte by byte. Removed at the end of the context unless kept.

    The payload comes in one of three ways: in chunks, passed to `write`; in a shared file; or through a process group,
    into the file that `group_payload` names. In the last two cases, call `read_file`.
    """

    def __init__(
        self, manifest: Manifest, folder: ScratchFolder, *, base: DeltaBase | None, shared_file: Path | None
    ) -> None:
        self.manifest = manifest
        self.comes_in_chunks = shared_file is None and manifest.process_group is None
        self._folder = folder
        self._base = base
        self._header = manifest.header
        self._total_bytes, self._payload_bytes = manifest.total_bytes, manifest.payload_bytes
        self._payload_file = shared_file
        self._file: IO[bytes] | None = None
        self._is_kept = False
        self._num_received = 0
        """Payload bytes received so far."""
        self._index = 0
        """Index of the tensor that the next byte belongs to."""
        self._num_hashed = 0
        """Bytes of that tensor hashed so far."""
        self._hash = hashlib.sha256()
        self._block = bytearray()
        """In a delta, the bytes received so far of that tensor's block."""
        self._base_bytes = memoryview(b"")
        self._base_offset = len(self._header)

    def __enter__(self) -> Self:
        with self._storage_errors():
            self._file = tempfile.NamedTemporaryFile(dir=self._folder.ensure(), suffix=".safetensors", delete=False)
            try:
                self._prepare(self._file)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None  # noqa: S101 (entered)
        if not self._is_kept:
            self.path.unlink(missing_ok=True)
        if self.manifest.process_group is not None and self._base is not None and self._payload_file is not None:
            self._payload_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the disk may be full, but the unwritten bytes are no longer needed
            self._file.close()

    @property
    def path(self) -> Path:
        """The file: safetensors, once `finish` returned."""
        assert self._file is not None  # noqa: S101 (entered)
        return Path(self._file.name)

    def group_payload(self) -> GroupPayload:
        """Return what to receive through the process group of the manifest."""
        group = self.manifest.process_group
        assert group is not None  # noqa: S101 (called for such pushes only)
        assert self._payload_file is not None  # noqa: S101 (entered)
        rendezvous = Rendezvous(group.backend, group.rendezvous)
        header = self._header if self._base is None else b""
        return GroupPayload(rendezvous, self.manifest.part_bytes, header, self._payload_file, group.timeout_s)

    def keep(self) -> Path:
        """Do not remove the file at the end of the context; return its path."""
        self._is_kept = True
        return self.path

    def write(self, offset: int, data: bytes) -> None:
        """Append the next bytes of the payload.

        Raises:
            InvalidRequest: the offset is wrong, there are too many bytes, or a completed tensor has a wrong checksum.
            BackendDown: the disk is full or fails.
        """
        if offset != self._num_received:
            raise InvalidRequest.field(
                "chunk.offset", f"is {offset}; required: {self._num_received}, the number of bytes received so far"
            )
        if self._num_received + len(data) > self._payload_bytes:
            raise InvalidRequest.field("chunk.data", f"exceeds the {self._payload_bytes} bytes of the payload")
        self._num_received += len(data)
        rest = memoryview(data)
        if self._base is None:
            self._append(rest)
            return
        while rest:
            self._copy_unchanged()
            tensor = self.manifest.tensors[self._index]
            num_taken = min(len(rest), tensor.block_bytes - len(self._block))
            self._block += rest[:num_taken]
            rest = rest[num_taken:]
            if len(self._block) == tensor.block_bytes:
                self._decode_block(tensor)

    def read_file(self) -> None:
        """Read the whole payload from its file. Raises as `write` does."""
        source = self._payload_file
        assert source is not None  # noqa: S101 (called for such pushes only)
        with _read_errors(source):
            if self._base is None:
                self._link_and_check(source)
                return
            with source.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    self.write(self._num_received, data)

    def finish(self, total_bytes: int) -> None:
        """Check that the payload is complete, and flush the file. Raises as `write` does."""
        if not total_bytes == self._payload_bytes == self._num_received:
            raise InvalidRequest.field(
                "commit.total_bytes",
                f"is {total_bytes}; required: {self._payload_bytes}, of which {self._num_received} were received",
            )
        if self._base is not None:
            self._copy_unchanged()
        assert self._file is not None  # noqa: S101 (entered)
        with self._storage_errors():
            self._file.flush()

    def _prepare(self, file: IO[bytes]) -> None:
        """Check the free space. Write the header, unless `read_file` or the group's receiver writes the whole file."""
        manifest = self.manifest
        num_bytes = self._total_bytes
        if manifest.process_group is not None:
            self._payload_file = self.path
            if self._base is not None:
                descriptor, name = tempfile.mkstemp(prefix="payload-", dir=self.path.parent)
                os.close(descriptor)
                self._payload_file = Path(name)
                num_bytes += self._payload_bytes
        elif self._payload_file is not None and self._base is None:
            return  # `read_file` links or copies the file
        check_free_space(self._folder.parent, num_bytes)
        if self._payload_file == self.path:
            return  # the receiver of the group writes the file
        file.write(self._header)
        if self._base is not None:
            with self._base.path.open("rb") as base:
                self._base_bytes = memoryview(mmap.mmap(base.fileno(), 0, prot=mmap.PROT_READ))

    def _link_and_check(self, source: Path) -> None:
        """Link or copy a safetensors file of whole parameters to `path`, unless it is there already; then check it."""
        num_bytes = len(self._header) + self._total_bytes
        if source != self.path:
            _check_size(source, source.stat().st_size, num_bytes)
            self._link(source)
        with self.path.open("rb") as file:
            _check_size(source, os.fstat(file.fileno()).st_size, num_bytes)
            if file.read(len(self._header)) != self._header:
                raise InvalidRequest.field("manifest.file", f"the header of {source} does not list these tensors")
            while data := file.read(_READ_BYTES):
                self._check(memoryview(data))
        self._num_received = self._total_bytes

    def _link(self, source: Path) -> None:
        self.path.unlink()
        try:
            os.link(source, self.path)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            with self._storage_errors():
                check_free_space(self._folder.parent, self._total_bytes)
                shutil.copyfile(source, self.path)

    def _copy_unchanged(self) -> None:
        """Copy unchanged tensors from the base, up to the next tensor that has a block in the delta."""
        tensors = self.manifest.tensors
        while self._index < len(tensors) and not tensors[self._index].block_bytes:
            self._decode_block(tensors[self._index])

    def _decode_block(self, tensor: TensorSpec) -> None:
        """Apply the delta's block to a tensor of the base, and append the result."""
        end = self._base_offset + tensor.num_bytes
        content = bytearray(self._base_bytes[self._base_offset : end])
        try:
            apply_delta(content, self._block, tensor.num_changed, tensor.itemsize, f"manifest.tensors[{self._index}]")
        except CodecError as error:
            raise InvalidRequest.field(error.field, f"the block of {tensor.name} {error.description}") from error
        self._base_offset = end
        self._block = bytearray()
        self._append(memoryview(content))
        if not content:
            self._check_tensor(tensor)

    def _append(self, data: memoryview) -> None:
        assert self._file is not None  # noqa: S101 (entered)
        with self._storage_errors():
            self._file.write(data)
        self._check(data)

    def _check(self, data: memoryview) -> None:
        """Hash the next bytes of the parameters. Check the hash of each completed tensor."""
        while data:
            tensor = self.manifest.tensors[self._index]
            num_taken = min(len(data), tensor.num_bytes - self._num_hashed)
            self._hash.update(data[:num_taken])
            self._num_hashed += num_taken
            data = data[num_taken:]
            if self._num_hashed == tensor.num_bytes:
                self._check_tensor(tensor)

    def _check_tensor(self, tensor: TensorSpec) -> None:
        if self._hash.digest() != tensor.sha256:
            raise InvalidRequest.field(
                f"manifest.tensors[{self._index}].sha256", f"does not match the bytes received of {tensor.name}"
            )
        self._index += 1
        self._num_hashed = 0
        self._hash = hashlib.sha256()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendDown(
                f"the push cannot be stored in {self._folder.parent}: {error.strerror}",
                remedy=f"It needs {self._total_bytes} bytes: free space there, or set staging_dir to another folder.",
            ) from error


def _check_size(source: Path, found: int, required: int) -> None:
    if found != required:
        raise InvalidRequest.field("manifest.file", f"{source} has {found} bytes; required: {required}")


@contextlib.contextmanager
def _read_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest.field("manifest.file", f"{source} cannot be read: {error.strerror}") from error
