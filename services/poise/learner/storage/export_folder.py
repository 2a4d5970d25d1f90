"""Exports: the policy as a Hugging Face folder, whole or not at all, among files that are none of it.

Owns how they are told from those, and are replaced. Knows no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from poise.errors import InvalidRequest
from poise.runtime.files.atomic import tensor_errors
from poise.runtime.models.checkpoint_digest import EXPORT_MARK

MARK = EXPORT_MARK


def write_export(folder: Path, name: str, policy_version: int, save: Callable[[str], None]) -> Path:
    """Have `save` write a model to a folder, and put that into `folder` as `name`, in place of an earlier export.

    Raises:
        InvalidRequest: something else has that name.
        OSError: it cannot be written; the earlier one is still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, old = folder / name, folder / f".{name}.old"
    _refuse_if_taken(target)
    shutil.rmtree(old, ignore_errors=True)
    with _written(folder / f".{name}.writing", policy_version, save) as writing:
        if target.exists():
            target.rename(old)
        writing.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target.resolve()


def try_export(folder: Path, name: str, save: Callable[[str], None]) -> Path:
    """Do all that `write_export` does with what `save` writes, and remove it; return where an export would be.

    Raises:
        InvalidRequest: something else has that name.
        OSError: nothing can be written there.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    target, renamed = folder / name, folder / f".{name}.checked"
    _refuse_if_taken(target)
    shutil.rmtree(renamed, ignore_errors=True)
    with _written(folder / f".{name}.checking", 0, save) as writing:
        writing.rename(renamed)
        shutil.rmtree(renamed)
    if is_new:
        with contextlib.suppress(OSError):  # it is not empty any more
            folder.rmdir()
    return target.resolve()


def _refuse_if_taken(target: Path) -> None:
    if os.path.lexists(target) and not (target / MARK).is_file():
        raise InvalidRequest.field(
            "name", f"{target} is there already and is no export, for it holds no {MARK}; choose another name"
        )


@contextlib.contextmanager
def _written(writing: Path, policy_version: int, save: Callable[[str], None]) -> Iterator[Path]:
    """Have `save` write a folder for the block to rename; whatever fails, nothing is left: the disk may be full."""
    shutil.rmtree(writing, ignore_errors=True)
    try:
        with tensor_errors(writing):
            save(str(writing))
        (writing / MARK).write_text(json.dumps({"policy_version": policy_version}))
        yield writing
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
