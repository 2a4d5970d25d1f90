"""Where pushes are collected: the one being received, the base of deltas, and the adapter that is served.

Owns those files. Knows neither gRPC nor an engine. Its methods block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from poise.errors import BackendDown, InvalidRequest, VersionMismatch
from poise.generation.served_policy import ServedPolicy
from poise.generation.weights.adapter_files import laid_out
from poise.generation.weights.capacity import choose_folder, refuse_unless_room, staging_folders
from poise.generation.weights.manifest import Announcement
from poise.generation.weights.payload import Body
from poise.generation.weights.received_files import Base, LinkedWeights, StagedDelta, StagedWeights
from poise.runtime.files.scratch import ScratchFolder, remove_leftovers
from poise.runtime.rpc.validation import quoted
from poise_client.codec import safetensors_header

_PREFIX = "poise-weights-"


class Staging:
    """The files of this process: the push being received, and the base. Close it at the end."""

    def __init__(self, parent: Path | None, *, keep_base: bool, shared_dirs: Sequence[Path]) -> None:
        self._folders = {path: ScratchFolder(path, _PREFIX) for path in staging_folders(parent)}
        self._folder = next(iter(self._folders.values()))
        self._keep_base = keep_base
        self._shared_dirs = shared_dirs
        self.base: Base | None = None
        """What a delta may build on."""
        self._adapter: Path | None = None
        """Folder of the adapter that is served."""

    def remove_leftovers(self) -> None:
        """Remove what killed processes left. To be called when the process starts."""
        for parent in self._folders:
            remove_leftovers(parent, _PREFIX)

    def close(self) -> None:
        """Leave nothing behind. Safe to call twice."""
        self.base = None
        for folder in self._folders.values():
            folder.close()

    def landing(self, announced: Announcement) -> AbstractContextManager[Body]:
        """Give room for a body that comes through a group: a file that is removed at the end of the context.

        Raises:
            BackendDown: it cannot be made.
        """
        if announced.base is None:
            self._make_room(announced)
        return _landing(announced, self._folder)

    def receive(self, announced: Announcement, landed: Path | None = None) -> StagedWeights:
        """Return the file to fill with the body that was announced: a context manager.

        Args:
            announced: what the push says that it brings.
            landed: a file of this process's own that holds the body already.

        Raises:
            VersionMismatch: the base of a delta is not kept.
            InvalidRequest: the push names a file that it may not, or a delta does not fit its base.
        """
        base = None if announced.base is None else self._base_of(announced, announced.base)
        source = self._shared_file(announced) if announced.file else landed
        if base is not None:
            return StagedDelta(announced, self._folder, source, base)
        if landed is None:
            self._make_room(announced)
        return (StagedWeights if source is None else LinkedWeights)(announced, self._folder, source)

    def applied(self, staged: StagedWeights, announced: Announcement) -> None:
        """Keep what is served now, where it may be wanted and there is room for the next version beside it."""
        self.drop_base()
        if not (self._keep_base and announced.keep):
            return
        if shutil.disk_usage(staged.path.parent).free >= announced.total_bytes:
            self.base = Base(announced.policy, announced.tensors, staged.keep())

    def lay_out(self, staged: StagedWeights, announced: Announcement) -> AbstractContextManager[Path]:
        """Give the folder of the adapter that was received; removed if the context ends in an error.

        Raises:
            BackendDown: there is no room for it.
        """
        assert announced.adapter is not None  # noqa: S101 (asked for adapters alone)
        names = [tensor.name for tensor in announced.tensors]
        return laid_out(staged.path, names, announced.adapter, self._folder)

    def serves(self, folder: Path) -> None:
        """Keep an adapter's folder, which is served now, rather than the one before."""
        if self._adapter is not None:
            shutil.rmtree(self._adapter, ignore_errors=True)
        self._adapter = folder

    def drop_base(self) -> None:
        """Take no delta until whole parameters came."""
        if self.base is not None:
            self.base.path.unlink(missing_ok=True)
            self.base = None

    def _make_room(self, announced: Announcement) -> None:
        """Let go of the base, for of whole parameters there is room for one version, and go where that is."""
        self.drop_base()
        self._folder = self._folders[choose_folder(tuple(self._folders), announced.total_bytes)]

    def _base_of(self, announced: Announcement, wanted: ServedPolicy) -> Base:
        if self.base is None or self.base.policy != wanted:
            kept = "none is" if self.base is None else f"version {self.base.policy.policy_version} is"
            raise VersionMismatch(
                f"a delta against version {wanted.policy_version} came, and {kept} kept",
                remedy="Push whole parameters.",
            )
        if [tensor.form for tensor in self.base.tensors] != [tensor.form for tensor in announced.tensors]:
            raise InvalidRequest.field("manifest.tensors", "are not those of the base, in its order")
        return self.base

    def _shared_file(self, announced: Announcement) -> Path:
        """Return the file that a push names, links resolved, if it lies where it may."""
        given = Path(announced.file)
        try:
            path = Path(os.path.realpath(given))
            within = any(path.is_relative_to(os.path.realpath(one)) for one in self._shared_dirs)
            is_file = within and path.is_file()
        except (OSError, ValueError) as error:  # such as a name longer than the disk takes
            raise InvalidRequest.field("manifest.file", f"{quoted(announced.file)} cannot be read: {error}") from error
        if not given.is_absolute() or not within:
            allowed = ", ".join(map(str, self._shared_dirs)) or "none is allowed: set it to take such pushes"
            raise InvalidRequest.field("manifest.file", f"must lie within one of shared_dirs ({allowed})")
        if not is_file:
            raise InvalidRequest.field(
                "manifest.file", f"{quoted(str(path))} is no file here; do both run on one host?"
            )
        return path


@contextlib.contextmanager
def _landing(announced: Announcement, folder: ScratchFolder) -> Iterator[Body]:
    assert announced.rendezvous is not None  # noqa: S101 (asked for bodies through groups alone)
    header = safetensors_header(tensor.form for tensor in announced.tensors) if announced.base is None else b""
    try:
        inside = folder.ensure()
        refuse_unless_room(folder.parent, announced.body_bytes)
        descriptor, name = tempfile.mkstemp(prefix="landing-", dir=inside)
    except OSError as error:
        raise BackendDown(f"the push cannot be stored in {folder.parent}: {error.strerror}") from error
    os.close(descriptor)
    try:
        yield Body(announced.rendezvous, announced.part_bytes, header, Path(name), announced.timeout_s)
    finally:
        Path(name).unlink(missing_ok=True)
