"""Checks that the file systems of the learner's folders have room for the files to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.runtime.files.atomic import free_bytes


@dataclass(frozen=True, slots=True)
class Room:
    """A folder and the bytes that it must have room for."""

    setting: str
    """Names the folder in the settings."""
    folder: Path
    num_bytes: int
    what: str
    """The file or folder of this size, in words."""


def lacking_room(rooms: Sequence[Room]) -> Iterator[str]:
    """Yield a message for each folder whose file system has less room than all folders on it need."""
    needed: dict[int, int] = {}
    for room in rooms:
        folder = _existing(room.folder)
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + room.num_bytes
        free = free_bytes(folder)
        if free < needed[device]:
            others = " beside the others" if needed[device] > room.num_bytes else ""
            yield (
                f"{room.setting} {room.folder} has {free / 1e9:.2f} GB free, and {room.what}{others} takes "
                f"{needed[device] / 1e9:.2f} GB. Make room, or name another {room.setting}"
            )


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there already."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
