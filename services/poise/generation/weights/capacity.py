"""Where there is room for a push of weights: on disk, and in memory. Knows sizes, not what is in them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from poise.errors import BackendDown
from poise.runtime.files.atomic import free_bytes

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (files in it are made with unguessable names)
_CGROUP = Path("/sys/fs/cgroup")
_VERSIONS_HELD = 2
"""What a folder has room for to be chosen: the version before may be kept while the next one comes."""


def staging_folders(named: Path | None) -> list[Path]:
    """Return where pushes may be collected, the best first: the folder that is named, else those of this machine."""
    if named is not None:
        return [named]
    temporary = _temporary_folder()
    return [folder for folder in (_SHARED_MEMORY, temporary) if os.access(folder, os.W_OK)] or [temporary]


def choose_folder(folders: Sequence[Path], num_bytes: int) -> Path:
    """Return the first folder with room for twice `num_bytes`; where none has, that with most. Raises `OSError`."""
    if len(folders) == 1:
        return folders[0]
    for folder in folders:
        if free_bytes(folder) >= _VERSIONS_HELD * num_bytes:
            return folder
    return max(folders, key=free_bytes)


def refuse_unless_room(folder: Path, num_bytes: int) -> None:
    """Raise `BackendDown` where `num_bytes` cannot be stored in `folder`, which must be there. Raises `OSError`."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise BackendDown(
            f"the push cannot be stored in {folder}: it takes {num_bytes} bytes, and {free:.0f} are free",
            remedy="Make room for it there, or name another folder in staging_dir.",
        )


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return how much memory this process can still take: of the machine's, and within its container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return free  # there is no limit, or one that cannot be seen
    if limit == "max":
        return free
    reclaimable = int(statistics["inactive_file"]) + int(statistics["active_file"])
    return min(free, int(limit) - int(used) + reclaimable)


def return_freed_memory() -> None:
    """Give back to the machine what this process has freed and its allocator keeps, as far as that can be told to.

    It would count as used otherwise. glibc keeps what lies below something that is still in use.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class MemoryTurn:
    """A turn to take much memory, after a look at how much is free: else two processes would count on the same.

    One process has it at a time, of those of a user that share the folder for temporary files. Who dies loses it.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def take(self) -> bool:
        """Return whether this has the turn now; never waits. Raises `OSError` where its file cannot be had."""
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

    def give_back(self) -> None:
        """Let others have it."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def _temporary_folder() -> Path:
    # As it is named, usable or not: `tempfile` would quietly take another, and nobody would be told what to mend.
    return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
