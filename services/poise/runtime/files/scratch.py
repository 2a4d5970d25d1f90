"""A folder for what must not outlive its process: removed at the end, or after a kill by whoever starts next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class ScratchFolder:
    """A folder of this process's own within one that several may share. Close it at the end.

    It is locked for as long as the process lives. A lock tells who is gone, for it ends with its process; a process id
    would not: in a container that was killed and started again it is the same one.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        self.parent = parent
        self._prefix = prefix
        self._path: Path | None = None
        self._descriptor = -1

    def ensure(self) -> Path:
        """Return the folder, made when it is not there, or no longer: some clean /tmp by age. Raises `OSError`.

        Making it removes what processes that are gone left beside it.
        """
        if self._path is not None and self._path.is_dir():
            return self._path
        self.close()
        self.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.parent, self._prefix)
        while True:
            path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.parent))
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.is_dir():
                self._path, self._descriptor = path, descriptor
                return path
            os.close(descriptor)  # a process that was starting took it for a leftover, before it was locked

    def close(self) -> None:
        """Remove the folder with all in it. Safe to call twice."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._descriptor)
            self._path, self._descriptor = None, -1


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the scratch folders in `parent` whose processes are gone."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
