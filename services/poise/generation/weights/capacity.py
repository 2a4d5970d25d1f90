"""Checks of free disk space and memory: where to stage a push, and whether a second copy of the weights fits."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from poise.errors import BackendDown
from poise.runtime.files.atomic import free_bytes

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (files in it get unguessable names)
_CGROUP = Path("/sys/fs/cgroup")
_NUM_VERSIONS = 2
"""A staging folder should have space for two versions: the base of the next delta, and the next version."""


def staging_folders(configured: Path | None) -> list[Path]:
    """Return the folders to stage pushes in, best first: the configured one, or those of this machine."""
    if configured is not None:
        return [configured]
    temporary = _temporary_folder()
    return [folder for folder in (_SHARED_MEMORY, temporary) if os.access(folder, os.W_OK)] or [temporary]


def choose_folder(folders: Sequence[Path], num_bytes: int) -> Path:
    """Return the first folder with space for two versions of `num_bytes`, or else the one with most free space.

    Raises:
        OSError: the free space of a folder cannot be read.
    """
    if len(folders) == 1:
        return folders[0]
    for folder in folders:
        if free_bytes(folder) >= _NUM_VERSIONS * num_bytes:
            return folder
    return max(folders, key=free_bytes)


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise `BackendDown` unless an existing folder has `num_bytes` free. Raises `OSError` if that cannot be read."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise BackendDown(
            f"the push cannot be stored in {folder}: it needs {num_bytes} bytes, and {free:.0f} are free",
            remedy="Free space there, or set staging_dir to another folder.",
        )


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that this process can still allocate, within the machine's and its container's limits."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return free  # no limit, or none that this process can read
    if limit == "max":
        return free
    reclaimable = int(statistics["inactive_file"]) + int(statistics["active_file"])
    return min(free, int(limit) - int(used) + reclaimable)


def trim_memory() -> None:
    """Give freed heap memory back to the operating system (malloc_trim).

    glibc cannot return memory below a block that is still in use.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class MemoryLock:
    """A lock to hold while measuring free memory and allocating it, so that two processes do not use the same bytes.

    Processes of one user with the same temporary folder share it. It is released when its process exits.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def try_acquire(self) -> bool:
        """Acquire the lock without blocking; return whether this object has it. Raises `OSError` on a file error."""
        if self._file is not None:
            return True
        path = _temporary_folder() / f"poise-memory-{os.getuid()}.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock if this object has it."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def _temporary_folder() -> Path:
    # Not `tempfile.gettempdir`: it silently falls back to another folder when TMPDIR cannot be used.
    return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
