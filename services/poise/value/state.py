"""The state folder: snapshots written whole, never half, and read back checked.

    <folder>/lock                          held while a service uses the folder
    <folder>/holder.json                   where that service is
    <folder>/state-00000042.safetensors    arrays
    <folder>/state-00000042.json           everything else, with the checksum of both; renamed last: it is the commit

Owns files. The last two good states are kept; a damaged one is named in the log and the one before is used.
Each save writes everything: simple, and cheap up to windows of some tens of MB.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.numpy
from safetensors import SafetensorError

from poise.runtime.files import commit_file, save_tensors, write_file
from poise.value.snapshot import Snapshot

logger = logging.getLogger(__name__)

_KEPT = 2

_HALF_WRITTEN = ".tmp" + 6 * "[A-Za-z0-9]"
"""Where safetensors writes before it renames: left behind by a process that was killed meanwhile."""


class StateError(OSError):
    """The folder cannot be used. The message names the file and the remedy."""


class StateInUseError(StateError):
    """Another process holds the folder."""


class StateStore:
    """One folder. Not for concurrent saves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self._good: list[int] = []
        self._sequence = 0

    def open(self) -> Snapshot | None:
        """Take the folder and return the newest undamaged state; None when there is none at all.

        Raises:
            StateInUseError: another process holds the folder.
            StateError: it cannot be written, or every state in it is damaged. The folder is let go of again.
        """
        try:
            self._take()
            return self._load()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateInUseError(
                f"state_dir {self._folder} is in use by another value service; stop that one, use another state_dir, "
                "or set standby.enabled to wait for it"
            ) from None
        except OSError as error:
            raise StateError(f"state_dir {self._folder} cannot be used: {error}") from error

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def announce(self, address: str) -> None:
        """Say where the service that holds the folder is. Raises `OSError`."""
        write_file(self._folder / "holder.json", json.dumps({"address": address}).encode())

    def holder(self) -> str | None:
        """Return where the service is that holds the folder, or held it last; None if none ever said."""
        try:
            address = json.loads((self._folder / "holder.json").read_text())["address"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return address if isinstance(address, str) else None

    def save(self, snapshot: Snapshot) -> Path:
        """Write a state, durable on return, and drop all but the last two. Returns the file that committed it.

        Raises:
            OSError: it could not be written; the states before are untouched.
        """
        sequence = self._sequence + 1
        tensors, manifest = self._files(sequence)
        document, arrays = snapshot.encode()

        temporary = tensors.with_suffix(".tmp")
        save_tensors(temporary, arrays)
        document["tensors_sha256"] = _file_sha256(temporary)
        commit_file(temporary, tensors)

        body = json.dumps(document, separators=(",", ":"))
        write_file(manifest, json.dumps({"sha256": _sha256(body), "body": body}).encode())

        self._sequence = sequence
        self._good = [*self._good, sequence][-_KEPT:]
        self._drop_others()
        return manifest

    def _load(self) -> Snapshot | None:
        sequences = sorted(self._sequences(), reverse=True)
        if sequences:
            self._sequence = sequences[0]
        for sequence in sequences:
            try:
                snapshot = self._read(sequence)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                logger.error(
                    "state %s is damaged and refused: %s: %s; trying the one before (what it alone held is lost)",
                    self._files(sequence)[1],
                    type(error).__name__,
                    error,
                )
                continue
            self._good = [sequence]
            return snapshot
        if sequences:
            raise StateError(
                f"every state in state_dir {self._folder} is damaged; restore one from a backup, or empty the folder "
                "to start with no probes (labels consumed so far are then forgotten)"
            )
        return None

    def _read(self, sequence: int) -> Snapshot:
        tensors, manifest = self._files(sequence)
        envelope = json.loads(manifest.read_text(encoding="utf-8"))
        if _sha256(envelope["body"]) != envelope["sha256"]:
            raise ValueError("its checksum does not match")
        document: dict[str, Any] = json.loads(envelope["body"])
        if _file_sha256(tensors) != document["tensors_sha256"]:
            raise ValueError(f"the checksum of {tensors.name} does not match")
        return Snapshot.decode(document, safetensors.numpy.load_file(tensors))

    def _files(self, sequence: int) -> tuple[Path, Path]:
        stem = self._folder / f"state-{sequence:08d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def _sequences(self) -> Iterator[int]:
        for path in self._folder.glob("state-*.json"):
            number = path.stem.removeprefix("state-")
            if number.isdecimal():
                yield int(number)

    def _drop_others(self) -> None:
        kept = {path for sequence in self._good for path in self._files(sequence)}
        for pattern in ("state-*", _HALF_WRITTEN):
            for path in self._folder.glob(pattern):
                if path not in kept:
                    path.unlink(missing_ok=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
