"""Checkpoints: all that training goes on from, in safetensors and JSON, whole or not at all.

    <folder>/lock                            held while a service uses the folder
    <folder>/lineage                         names the sequence of versions
    <folder>/checkpoint-00000042/            renamed into place when all in it is durable
        tensors.safetensors                  parameters and optimizer moments
        seen.safetensors                     digests of the rollouts trained on
        state.json                           the rest, with checksums of all

Owns the files. A damaged checkpoint is named in the log and renamed to damaged-…, and the one before is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

from poise.errors import Misconfigured
from poise.runtime.files.atomic import sync_folder, tensor_errors, write_file

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)
"""1 does not tell its progress' origin. Releases that know no origin refuse 2 by name, and take it for no damage."""

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What reading a damaged checkpoint raises."""

_PREFIX = "checkpoint-"
_FILES = ("tensors.safetensors", "seen.safetensors")


class StateError(OSError):
    """The folder cannot be used. The message names it and the remedy."""


class StateMismatchError(StateError, Misconfigured):
    """The folder was written under settings, or by a release, that the present ones cannot continue."""


@dataclass(frozen=True)
class Progress:
    """The state that is no tensor."""

    policy_version: int = 0
    num_updates: int = 0
    num_batches: int = 0
    """Batches journalled and done: the sequence number of the next."""
    num_rollouts: int = 0
    num_rejected: dict[str, int] = field(default_factory=dict)
    last_batch_id: str = ""
    num_skipped_in_a_row: int = 0
    """Mini-batches since the last that changed the policy."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the policy was made of; see `poise.learner.resume_checks`. Empty where schema 1 does not tell it."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read."""

    progress: Progress
    tensors: dict[str, torch.Tensor]
    seen: set[bytes]


class CheckpointStore:
    """One folder. Not for concurrent use."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._lock: IO[bytes] | None = None
        self._good: int | None = None
        """Batch count of the checkpoint known to be whole: written or read here."""

    def open(self) -> None:
        """Take the folder. Raises `StateError` when another process holds it, or it cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StateError(
                f"state_dir {self._folder} is in use by another learner; stop that one, or use another state_dir"
            ) from None
        except OSError as error:
            raise StateError(f"state_dir {self._folder} cannot be used: {error}") from error
        for leftover in self._folder.glob("writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def try_writing(self) -> None:
        """Write a checkpoint of nothing, and remove it. Raises `OSError`."""
        temporary = self._folder / f"writing-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with tensor_errors(temporary):
                _write(temporary, Progress(), {"nothing": torch.zeros(1)}, set())
            shutil.rmtree(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor], seen: Set[bytes]) -> Path:
        """Write a checkpoint, durable on return, and drop all but the newest `keep`. Returns its folder.

        The state after so many batches is one: what is kept of it already is not written again.

        Raises:
            OSError: it could not be written; those before are untouched.
        """
        target = self._path(progress.num_batches)
        if progress.num_batches == self._good:
            return target
        temporary = self._folder / f"writing-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with tensor_errors(temporary):
                _write(temporary, progress, tensors, seen)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full: not of this
            raise
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(self._folder)
        self._good = progress.num_batches
        for old in self.sequences()[: -self._keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return target

    def lineage(self) -> str:
        """Return the lineage's name, made at the first call ever."""
        path = self._folder / "lineage"
        return path.read_text() if path.exists() else self.new_lineage()

    def new_lineage(self) -> str:
        """Begin another sequence of versions, and return its name."""
        name = uuid.uuid4().hex
        write_file(self._folder / "lineage", name.encode())
        return name

    def sequences(self) -> list[int]:
        """Return the batch counts at which checkpoints were taken, oldest first."""
        return sorted(int(path.name.removeprefix(_PREFIX)) for path in checkpoint_folders(self._folder))

    def load(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint; None when there is none at all.

        Raises:
            StateError: there are some, and all are damaged; or the newest is of another release.
        """
        for sequence in reversed(self.sequences()):
            path = self._path(sequence)
            try:
                checkpoint = read_checkpoint(path)
            except StateError:
                raise
            except DAMAGE as error:
                logger.error("checkpoint %s is damaged and refused: %s; trying the one before", path, error)
                aside = self._folder / f"damaged-{path.name}"  # so that it is never counted among those to keep
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                continue
            self._good = sequence
            return checkpoint
        if any(self._folder.glob("damaged-*")):
            raise StateError(
                f"every checkpoint in state_dir {self._folder} is damaged; restore one from a backup, or use a fresh "
                "state_dir to start again from the model"
            )
        return None

    def _path(self, sequence: int) -> Path:
        return self._folder / f"{_PREFIX}{sequence:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in a state folder, oldest first; the folder need not be held, nor exist."""
    found = {path: path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")}
    return sorted((path for path, name in found.items() if name.isdecimal()), key=lambda path: int(found[path]))


def read_checkpoint(path: Path, prefix: str = "") -> Checkpoint:
    """Read one checkpoint, and of its tensors those whose names begin with `prefix`. The folder need not be held.

    Raises:
        StateMismatchError: it is of another release.
        Any of `DAMAGE`: it is damaged, or gone.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["schema_version"] not in _READ_VERSIONS:
        raise StateMismatchError(
            f"{path} has schema_version {state['schema_version']}; this release reads "
            f"{' and '.join(map(str, _READ_VERSIONS))}: use the release that wrote it, or a fresh state_dir to start "
            "again from the model"
        )
    for name in _FILES:
        if _sha256(path / name) != state["sha256"][name]:
            raise ValueError(f"the checksum of {name} does not match")
    if _sha256_of(state["progress"]) != state["sha256"]["progress"]:
        raise ValueError("the checksum of progress does not match")
    digests = safetensors.numpy.load_file(path / "seen.safetensors")["seen"]
    with safetensors.safe_open(path / "tensors.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118 (no mapping)
    return Checkpoint(Progress(**state["progress"]), tensors, {row.tobytes() for row in digests})


def _write(folder: Path, progress: Progress, tensors: dict[str, torch.Tensor], seen: Set[bytes]) -> None:
    """Make the folder of a checkpoint, durable on return. Raises `OSError` or `SafetensorError`."""
    folder.mkdir()
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "tensors.safetensors")
    digests = np.frombuffer(b"".join(sorted(seen)), np.uint8).reshape(-1, 16)
    safetensors.numpy.save_file({"seen": digests}, folder / "seen.safetensors")
    sums = {name: _sha256(folder / name) for name in _FILES} | {"progress": _sha256_of(asdict(progress))}
    state = {"schema_version": SCHEMA_VERSION, "sha256": sums, "progress": asdict(progress)}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
