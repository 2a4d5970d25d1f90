"""The copy of the trained model in the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from poise.orchestrator.errors import SettingsError
from poise.runtime.models.checkpoint_digest import EXPORT_MARK

MODEL = "model"
"""Name of the export, and of its folder in the run folder."""


def check_model_path(run_dir: Path) -> None:
    """Raise `SettingsError` if another file or folder is at the path of the model."""
    model = run_dir / MODEL
    if os.path.lexists(model) and not (model / EXPORT_MARK).is_file():
        raise SettingsError(
            f"{model} exists and is not an exported model: it has no {EXPORT_MARK}. The run writes its model there; "
            "move it away, or use another run folder"
        )


def copy_model(exported: Path, target: Path) -> None:
    """Copy an export to `target`, all or nothing. Do nothing if the export is not on this machine.

    Raises:
        OSError: copying failed. The call may be repeated.
    """
    if exported == target.resolve() or not exported.is_dir():
        return
    writing = target.with_name(f".{target.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        shutil.copytree(exported, writing)
    except OSError:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    writing.rename(target)
