"""Exports: the policy as a Hugging Face folder, from a running learner or from a checkpoint on disk.

A marker file identifies exports, so that no other folder is ever replaced.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from poise.errors import BackendDown, InvalidRequest, PoiseError
from poise.learner.config import LearnerConfig
from poise.learner.distributed.process_group import World
from poise.learner.distributed.rank_health import RankLost
from poise.learner.models.policy import Policy
from poise.learner.storage.checkpoint import DAMAGE, Checkpoint, StateError, checkpoint_folders, read_checkpoint
from poise.runtime.files.atomic import describe_disk_error, tensor_errors
from poise.runtime.models.checkpoint_digest import EXPORT_MARK

logger = logging.getLogger(__name__)

_PARAMETERS = "model."
_MAX_LISTINGS = 5
"""Maximum listings of the folder. A running learner may delete checkpoints after each."""


def write_export(folder: Path, name: str, policy_version: int, save: Callable[[str], None]) -> Path:
    """Write a model with `save` and rename it to `folder/name`, replacing an earlier export; return its path.

    Raises:
        InvalidRequest: `folder/name` exists and is not an export.
        OSError: the export cannot be written; the earlier one is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, old = folder / name, folder / f".{name}.old"
    _check_replaceable(target)
    shutil.rmtree(old, ignore_errors=True)
    with _written(folder / f".{name}.writing", policy_version, save) as writing:
        if target.exists():
            target.rename(old)
        writing.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target.resolve()


def check_export(folder: Path, name: str, save: Callable[[str], None]) -> Path:
    """Do what `write_export` does and delete the result; return the path that an export would have.

    Raises:
        InvalidRequest: `folder/name` exists and is not an export.
        OSError: an export cannot be written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    target, renamed = folder / name, folder / f".{name}.checked"
    _check_replaceable(target)
    shutil.rmtree(renamed, ignore_errors=True)
    with _written(folder / f".{name}.checking", 0, save) as writing:
        writing.rename(renamed)
        shutil.rmtree(renamed)
    if is_new:
        with contextlib.suppress(OSError):  # another process may have written to it
            folder.rmdir()
    return target.resolve()


@contextlib.contextmanager
def describing_errors(what: str, folder: Path, *, collective: bool = False) -> Iterator[None]:
    """Convert exceptions of an export to errors with a remedy.

    With `collective` other ranks take part, and torch.distributed raises `RuntimeError` if one is lost.

    Raises:
        RankLost: another rank was lost.
        PoiseError: anything else; nothing is lost.
    """
    try:
        yield
    except PoiseError:
        raise
    except OSError as error:
        raise BackendDown(
            f"{what} cannot be exported to export_dir {folder}: {describe_disk_error(error)}",
            remedy="Then request the export again; training is not affected.",
            retry_after_s=1.0,
        ) from error
    except Exception as error:
        logger.exception("the export failed")
        if collective and isinstance(error, RuntimeError):
            # The other ranks may be dead, or wait in a collective that this one has left.
            raise RankLost(f"{what} was not exported because another rank was lost: {error}") from error
        raise PoiseError(
            f"{what} cannot be exported: {type(error).__name__}: {error}",
            remedy="Correct the named file in the model's folder. The policy is safe in the learner's checkpoints, "
            "and the learner's log has the traceback.",
        ) from error


def newest_checkpoint(folder: Path) -> tuple[Path, Checkpoint]:
    """Return the newest undamaged checkpoint of a state folder, without moments. A learner may be using the folder.

    `folder` may also be a checkpoint itself. Nothing in it is changed.

    Raises:
        StateError: there is none, or it was written by another release.
    """
    if (folder / "state.json").is_file():
        try:
            return folder, read_checkpoint(folder, _PARAMETERS)
        except StateError:
            raise
        except DAMAGE as error:
            raise StateError(f"checkpoint {folder} is damaged: {error}. Name another one") from error
    listed: list[Path] = []
    for _ in range(_MAX_LISTINGS):
        listed = checkpoint_folders(folder)
        for path in reversed(listed):
            try:
                return path, read_checkpoint(path, _PARAMETERS)
            except StateError:
                raise
            except DAMAGE as error:
                if not path.exists():
                    break  # the learner has replaced it with a newer one
                logger.warning("checkpoint %s is damaged: %s; using the previous one", path, error)
        else:
            break
    if listed:
        raise StateError(f"none of the checkpoints in {folder} can be read. Restore one from a backup")
    raise StateError(
        f"{folder} has no checkpoint yet. The learner writes one every learner.checkpoint_every_steps steps, and when "
        "it is stopped"
    )


def export_checkpoint(config: LearnerConfig, path: Path, checkpoint: Checkpoint, target: Path) -> None:
    """Write a checkpoint's policy, adapters merged, with its tokenizer as the Hugging Face folder `target`; on the CPU.

    Raises:
        StateError: its parameters do not fit the model and adapters in the settings.
        BackendDown: the model in the settings cannot be loaded.
    """
    policy = Policy(config.model_copy(update={"device": "cpu"}), World(torch.device("cpu")))
    trained = dict(policy.trained())
    found = {name.removeprefix(_PARAMETERS): tensor for name, tensor in checkpoint.tensors.items()}
    if {name: tensor.shape for name, tensor in found.items()} != {name: own.shape for name, own in trained.items()}:
        raise StateError(
            f"checkpoint {path} has other parameters than model {config.model} under these settings. Use its own run "
            "file, with the same model and lora"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found[name])
    policy.save(str(target))


def _check_replaceable(target: Path) -> None:
    if os.path.lexists(target) and not (target / EXPORT_MARK).is_file():
        raise InvalidRequest.field(
            "name", f"{target} already exists and is not an export (it has no {EXPORT_MARK}). Choose another name"
        )


@contextlib.contextmanager
def _written(writing: Path, policy_version: int, save: Callable[[str], None]) -> Iterator[Path]:
    """Write a folder with `save` for the block to rename. On any error delete it, because the disk may be full."""
    shutil.rmtree(writing, ignore_errors=True)
    try:
        with tensor_errors(writing):
            save(str(writing))
        (writing / EXPORT_MARK).write_text(json.dumps({"policy_version": policy_version}))
        yield writing
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
