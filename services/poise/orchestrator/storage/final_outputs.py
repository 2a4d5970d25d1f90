"""What a run leaves at its end, tried at its start: the report, the curves, the model's copy.

Owns where the model goes in the run's folder. How the learner exports it is the learner's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError, kind_of_error
from poise.orchestrator.tasks.mixture import Mixture
from poise.report import TensorBoardLog, render_report
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.models.checkpoint_digest import EXPORT_MARK

MODEL = "model"
"""Names the export, and its folder in the run's."""


def try_outputs(config: OrchestratorConfig, mixture: Mixture) -> TensorBoardLog:
    """Return the open curves of a run, once everything else that it writes at its end was tried.

    Raises:
        SettingsError: a library is missing, or something else is where the model goes.
        RunError: a file or folder cannot be written.
        TaskError: there are too few held-out problems.
    """
    mixture.held_out(config.evaluation.num_prompts)
    model = config.run_dir / MODEL
    if os.path.lexists(model) and not (model / EXPORT_MARK).is_file():
        raise SettingsError(
            f"{model} is where this run puts its model, and holds something else: it has no {EXPORT_MARK}. Move it "
            "away, or name another run folder"
        )
    try:
        render_report(config.run_dir)
        return TensorBoardLog(config.run_dir / "tensorboard")
    except ImportError as error:
        raise SettingsError(
            f"the run's report and curves cannot be written: {error}. Install what is missing"
        ) from error
    except OSError as error:
        raise kind_of_error(error)(
            f"{config.run_dir}/tensorboard cannot be written: {describe_disk_error(error)}. Then run the same command "
            "again"
        ) from error


def keep_model(exported: Path, target: Path) -> None:
    """Copy an export to `target` if the learner's file system is this one, whole or not at all.

    Raises:
        OSError: it cannot be copied; the same call may be made again.
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
