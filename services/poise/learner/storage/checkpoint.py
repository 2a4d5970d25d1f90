"""Checkpoints: the state that training resumes from, in safetensors and JSON.

    <folder>/lock                            locked while a service uses the folder
    <folder>/lineage                         id of the sequence of policy versions
    <folder>/checkpoint-00000042/            renamed into place when its files are durable
        tensors.safetensors                  parameters, optimizer moments and random states
        seen.safetensors                     digests of the rollouts trained on
        state.json                           the progress, and checksums of everything

A damaged checkpoint is logged and renamed to damaged-…, and the previous one is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
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
"""Version 1 has no `origin` in its progress. Releases that only read 1 reject 2 by its number."""

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""Exceptions that reading a damaged checkpoint may raise."""

_PREFIX = "checkpoint-"
_FILES = ("tensors.safetensors", "seen.safetensors")


class StateError(OSError):
    """The state folder cannot be used. The message names the folder and the remedy."""


class StateMismatchError(StateError, Misconfigured):
    """The state folder was written with other settings, or by another release, and cannot be resumed with these."""


@dataclass(frozen=True)
class Progress:
    """The part of the learner's state that is not a tensor."""

    policy_version: int = 0
    num_updates: int = 0
    num_batches: int = 0
    """Batches processed, which is the sequence number of the next one."""
    num_rollouts: int = 0
    num_rejected: dict[str, int] = field(default_factory=dict)
    last_batch_id: str = ""
    num_skipped_in_a_row: int = 0
    """Mini-batches skipped since the last one that changed the policy."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The model and adapters, see `poise.learner.resume_checks`. Empty in schema 1."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of one checkpoint."""

    progress: Progress
    tensors: dict[str, torch.Tensor]
    seen: set[bytes]


class CheckpointStore:
    """The checkpoints of one state folder. Its calls must not overlap.

    `start_saving` copies the state and writes it on a thread while training continues; `finish_saving` waits for it.
    """

    def __init__(self, folder: Path, keep: int, on_saved: Callable[[Progress], None] = lambda _: None) -> None:
        """Initialize without touching the folder.

        Args:
            folder: the state folder.
            keep: number of checkpoints to keep.
            on_saved: called on the writing thread after `start_saving` has made a checkpoint durable.
        """
        self._folder = folder
        self._keep = keep
        self._on_saved = on_saved
        self._lock: IO[bytes] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[Path] | None = None
        self._intact: int | None = None
        """Batch count of a checkpoint that this process wrote or read without error."""

    def open(self) -> None:
        """Lock the folder. Raises `StateError` if another process has locked it, or it cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise StateError(
                f"state_dir {self._folder} is in use by another learner. Stop that one, or use another state_dir"
            ) from None
        except OSError as error:
            raise StateError(f"state_dir {self._folder} cannot be used: {error}") from error
        for unfinished in self._folder.glob("writing-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def close(self) -> None:
        """Wait for the checkpoint being written, then unlock the folder."""
        try:
            self._wait_and_log()
        finally:
            self._thread.shutdown()
            self._unlock()

    def check_writable(self) -> None:
        """Write an empty checkpoint and delete it. Raises `OSError`."""
        temporary = self._folder / f"writing-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with tensor_errors(temporary):
                _write(temporary, Progress(), {"nothing": torch.zeros(1)}, set())
            shutil.rmtree(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def start_saving(self, progress: Progress, tensors: Mapping[str, torch.Tensor], seen: Set[bytes]) -> None:
        """Wait for the previous checkpoint and log its error; then copy the state and write it on a thread."""
        self._wait_and_log()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._saving = self._thread.submit(self._save_copies, progress, copies, frozenset(seen))

    def finish_saving(self) -> Path | None:
        """Wait for the checkpoint being written; return its folder, or None if none is being written.

        Raises:
            OSError: it could not be written. Nothing is lost: the journal still has its batches.
        """
        saving, self._saving = self._saving, None
        return None if saving is None else saving.result()

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor], seen: Set[bytes]) -> Path:
        """Write a checkpoint, durable on return, and delete all but the newest `keep`; return its folder.

        The state after a number of batches is unique, so an intact checkpoint of the same number is not written again.

        Raises:
            OSError: it could not be written; the others are untouched.
        """
        target = self._path(progress.num_batches)
        if progress.num_batches == self._intact:
            return target
        temporary = self._folder / f"writing-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with tensor_errors(temporary):
                _write(temporary, progress, tensors, seen)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
            raise
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(self._folder)
        self._intact = progress.num_batches
        for old in self.sequences()[: -self._keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return target

    def lineage(self) -> str:
        """Return the lineage's id. Create it if the folder has none."""
        path = self._folder / "lineage"
        return path.read_text() if path.exists() else self.new_lineage()

    def new_lineage(self) -> str:
        """Start another sequence of policy versions; return its id."""
        name = uuid.uuid4().hex
        write_file(self._folder / "lineage", name.encode())
        return name

    def sequences(self) -> list[int]:
        """Return the batch counts of the checkpoints, oldest first."""
        return sorted(int(path.name.removeprefix(_PREFIX)) for path in checkpoint_folders(self._folder))

    def load(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint; None if the folder has never had one.

        Raises:
            StateError: all checkpoints are damaged, or the newest was written by another release.
        """
        for sequence in reversed(self.sequences()):
            path = self._path(sequence)
            try:
                checkpoint = read_checkpoint(path)
            except StateError:
                raise
            except DAMAGE as error:
                logger.error("checkpoint %s is damaged: %s; trying the previous one", path, error)
                aside = self._folder / f"damaged-{path.name}"  # no longer counted among the checkpoints to keep
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                continue
            self._intact = sequence
            return checkpoint
        if any(self._folder.glob("damaged-*")):
            raise StateError(
                f"every checkpoint in state_dir {self._folder} is damaged. Restore one from a backup, or use a fresh "
                "state_dir to start from the model"
            )
        return None

    def _save_copies(self, progress: Progress, tensors: dict[str, torch.Tensor], seen: Set[bytes]) -> Path:
        path = self.save(progress, tensors, seen)
        self._on_saved(progress)
        return path

    def _wait_and_log(self) -> None:
        try:
            self.finish_saving()
        except OSError as error:
            logger.error("the last checkpoint could not be written; the journal still has its batches: %s", error)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _path(self, sequence: int) -> Path:
        return self._folder / f"{_PREFIX}{sequence:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in a state folder, oldest first. The folder need not be locked, nor exist."""
    found = {path: path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")}
    return sorted((path for path, name in found.items() if name.isdecimal()), key=lambda path: int(found[path]))


def read_checkpoint(path: Path, prefix: str = "") -> Checkpoint:
    """Read a checkpoint, with the tensors whose names begin with `prefix`. The folder need not be locked.

    Raises:
        StateMismatchError: it was written by another release.
        Any of `DAMAGE`: it is damaged, or has been deleted.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["schema_version"] not in _READ_VERSIONS:
        raise StateMismatchError(
            f"{path} has schema_version {state['schema_version']}, but this release reads "
            f"{' and '.join(map(str, _READ_VERSIONS))}. Use the release that wrote it, or a fresh state_dir to start "
            "from the model"
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
    """Write the folder of a checkpoint, durable on return. Raises `OSError` or `SafetensorError`."""
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
