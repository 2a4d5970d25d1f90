"""A temporary folder that is removed when its process ends or, after a kill, when the next one starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class ScratchFolder:
    """A folder of this process in a parent that several processes share. Close it at the end.

    A file lock shows whether its process still runs. A process id does not: a restarted container reuses it.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        self.parent = parent
        self._prefix = prefix
        self._path: Path | None = None
        self._descriptor = -1

    def ensure(self) -> Path:
        """Return the folder; create it if it is missing. Some systems delete old folders in /tmp.

        Creating it removes the folders of processes that have exited. Raises `OSError`.
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
            os.close(descriptor)  # another process removed it as a leftover before it was locked

    def close(self) -> None:
        """Remove the folder with its content. Safe to call twice."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._descriptor)
            self._path, self._descriptor = None, -1


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the scratch folders in `parent` whose processes have exited."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process runs
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
