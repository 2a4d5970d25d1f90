"""Where there is room for a push of weights: on disk, and in memory. Knows sizes, not what is in them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from poise.errors import BackendDown

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (files in it are made with unguessable names)
_CGROUP = Path("/sys/fs/cgroup")
_VERSIONS_HELD = 2
"""What a folder has room for to be chosen: the version before may be kept while the next one comes."""


def staging_folders(named: Path | None) -> list[Path]:
    """Return where pushes may be collected, the best first: the folder that is named, else those of this machine."""
    if named is not None:
        return [named]
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
    return [folder for folder in (_SHARED_MEMORY, temporary) if os.access(folder, os.W_OK)] or [temporary]


def choose_folder(folders: Sequence[Path], num_bytes: int) -> Path:
    """Return the first folder with room for twice `num_bytes`; where none has, that with most. Raises `OSError`."""
    if len(folders) == 1:
        return folders[0]
    for folder in folders:
        if _free_bytes(folder) >= _VERSIONS_HELD * num_bytes:
            return folder
    return max(folders, key=_free_bytes)


def refuse_unless_room(folder: Path, num_bytes: int) -> None:
    """Raise `BackendDown` where `num_bytes` cannot be stored in `folder`, which must be there. Raises `OSError`."""
    free = _free_bytes(folder)
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


def _free_bytes(folder: Path) -> float:
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf  # some file systems have no size, such as a tmpfs without a limit
