"""Files that are there whole, or not at all, over crashes and power cuts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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


def write_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, durable on return."""
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(json_line, lines))
    commit_file(temporary, target)


def json_line(values: Mapping[str, Any]) -> str:
    """Return an object as a line of JSON.

    Raises:
        ValueError: it holds a number that JSON has no word for.
    """
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
