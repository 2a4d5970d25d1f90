"""Folders that are replaced whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def replace_folder(target: Path, write: Callable[[str], None]) -> None:
    """Let `write` make a folder of a path that is not there, and put it in the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    writing, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("writing", "old"))
    for leftover in (writing, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(str(writing))
    if target.exists():
        target.rename(old)
    writing.rename(target)
    shutil.rmtree(old, ignore_errors=True)
