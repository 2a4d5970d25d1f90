"""Files that are there whole, or not at all, over crashes and power cuts."""

from __future__ import annotations

import os
from pathlib import Path


def commit_file(temporary: Path, target: Path) -> None:
    """Make a written file durable under its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    sync_folder(target.parent)


def write_file(target: Path, data: bytes) -> None:
    """Write a file, durable on return."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(data)
    commit_file(temporary, target)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
