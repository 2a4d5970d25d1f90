"""Checks that the learner's folders have enough free disk space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.runtime.files.atomic import free_bytes


@dataclass(frozen=True, slots=True)
class SpaceNeed:
    """Free space that a folder needs."""

    setting: str
    """The setting that names the folder."""
    folder: Path
    num_bytes: int
    what: str
    """What needs the space, such as "a checkpoint"."""


def missing_space(needs: Sequence[SpaceNeed]) -> Iterator[str]:
    """Yield a message for each folder without enough space. Folders on one file system add up their needs."""
    needed: dict[int, int] = {}
    for need in needs:
        folder = _existing(need.folder)
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + need.num_bytes
        free = free_bytes(folder)
        if free < needed[device]:
            others = " and the other files there" if needed[device] > need.num_bytes else ""
            yield (
                f"{need.setting} {need.folder} has {free / 1e9:.2f} GB free, but {needed[device] / 1e9:.2f} GB are "
                f"needed for {need.what}{others}. Free some space, or set another {need.setting}"
            )


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
