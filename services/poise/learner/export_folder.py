"""Exports: the policy as a Hugging Face folder, whole or not at all, among files that are none of it.

Owns how they are told from those, and are replaced. Knows no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from poise.errors import InvalidRequest

MARK = "poise_export.json"
"""The file in every export that says of which version it is. Nothing without it is ever replaced."""


def write_export(folder: Path, name: str, policy_version: int, save: Callable[[str], None]) -> Path:
    """Have `save` write a model to a folder, and put that into `folder` as `name`, in place of an earlier export.

    Raises:
        InvalidRequest: something else has that name.
        OSError: it cannot be written; the earlier one is still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, writing, old = folder / name, folder / f".{name}.writing", folder / f".{name}.old"
    if os.path.lexists(target) and not (target / MARK).is_file():
        raise InvalidRequest.field(
            "name", f"{target} is there already and is no export, for it holds no {MARK}; choose another name"
        )
    for leftover in (writing, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save(str(writing))
    (writing / MARK).write_text(json.dumps({"policy_version": policy_version}))
    if target.exists():
        target.rename(old)
    writing.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target.resolve()
