"""The state folder: states written whole, never half, and read back checked.

    <folder>/lock                              held while a service uses the folder; holds that service's mark
    <folder>/holder.json                       where that service is
    <folder>/state-00000042.*.safetensors      the pieces that were new in the state: each large one, and the rest
    <folder>/state-00000042.json               everything else, with the checksum of all; renamed last: it is the commit
    <folder>/damaged-00000042/                 what could not be read, kept to be looked at

Owns files; `pieces` owns what is in them. The last two good states are kept. A state of even number shares pieces with
earlier ones of even number, and one of odd number with odd ones: so damage to one file never takes both. A damaged one
is named in the log, put aside, and the one before is used. What cannot be read for another reason is no damage, and
stops the service: going on from the state before would throw away a good one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.numpy
from safetensors import SafetensorError

from poise.errors import Misconfigured
from poise.runtime.files.atomic import save_tensors, sync_folder, write_file
from poise.value.store.pieces import SCHEMA_VERSION, Arrays, Document, join, split
from poise.value.store.snapshot import Snapshot

logger = logging.getLogger(__name__)

_LARGE_BYTES = 1 << 20
"""A piece as large has a file of its own; the smaller ones of a save share one, for each file waits for the disk."""

_HALF_WRITTEN = ".tmp" + 6 * "[A-Za-z0-9]"
"""Where safetensors writes before it renames: left behind by a process that was killed meanwhile."""


class StateError(OSError):
    """The folder cannot be used. The message names the file and the remedy."""


class StateMismatchError(StateError, Misconfigured):
    """The folder's content is of another release."""


class StateInUseError(StateError):
    """Another process holds the folder."""


class StateLostError(StateError):
    """The folder was this process's, and is not any more."""


class _DamagedError(Exception):
    """Files are not what was written."""


_Place = tuple[str, int]
"""Where a piece is: file, and number in it, with which the names of its arrays begin."""


@dataclass(frozen=True)
class _Stored:
    """A good state on disk."""

    sequence: int
    document: Document
    pieces: dict[str, _Place]
    checksums: dict[str, str]
    """By file."""


class StateStore:
    """One folder. Not for concurrent saves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self._mark = uuid.uuid4().hex.encode()
        self._good: dict[int, _Stored] = {}
        """The last good states, by whether their numbers are odd."""
        self._sequence = 0

    def open(self) -> Snapshot | None:
        """Take the folder and return the newest undamaged state; None when there is none at all.

        Raises:
            StateInUseError: another process holds the folder.
            StateError: it cannot be read or written, every state in it is damaged, or the newest is of another release.
                The folder is let go of again, and left as it was.
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
            self._lock = (self._folder / "lock").open("a+b")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(self._mark)
            self._lock.flush()
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

    def check_held(self) -> None:
        """Make sure that the folder is still this process's own.

        Raises:
            StateLostError: the lock file is another one, or bears another's mark: the file system gave the lock away.
        """
        with contextlib.suppress(OSError):
            if self._lock is not None:
                ours, there = os.fstat(self._lock.fileno()), (self._folder / "lock").stat()
                same_file = (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
                if same_file and os.pread(self._lock.fileno(), len(self._mark) + 1, 0) == self._mark:
                    return
        raise StateLostError(
            f"the lock of state_dir {self._folder} is not this service's any more; another may hold it. Nothing is "
            "written from here on. See that the file system keeps locks and that nobody removes the file"
        )

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
            StateLostError: the folder is not this process's any more.
            OSError: it could not be written; the states before are untouched.
        """
        self.check_held()
        sequence = self._sequence + 1
        before = self._good.get(sequence % 2)
        document, made = split(snapshot, before.document if before else None)
        pieces = {name: before.pieces[name] for name in made if name in before.pieces} if before else {}
        checksums = {file: before.checksums[file] for file, _ in pieces.values()} if before else {}
        small: Arrays = {}
        for number, name in enumerate(name for name in made if name not in pieces):
            arrays = {f"{number}.{key}": array for key, array in made[name]().items()}
            is_large = sum(array.nbytes for array in arrays.values()) >= _LARGE_BYTES
            file = f"state-{sequence:08d}.{number if is_large else 'rest'}.safetensors"
            pieces[name] = file, number
            if is_large:
                checksums[file] = self._write(file, arrays)
            else:
                small |= arrays
        if small:
            file = f"state-{sequence:08d}.rest.safetensors"
            checksums[file] = self._write(file, small)
        sync_folder(self._folder)

        manifest = self._manifest(sequence)
        body = json.dumps({**document, "pieces": pieces, "checksums": checksums}, separators=(",", ":"))
        envelope = json.dumps({"sha256": _sha256(body.encode()), "body": body})
        self.check_held()
        write_file(manifest, envelope.encode())

        self._sequence = sequence
        self._good[sequence % 2] = _Stored(sequence, document, pieces, checksums)
        for path in self._others():
            path.unlink(missing_ok=True)
        return manifest

    def _load(self) -> Snapshot | None:
        sequences = sorted(self._sequences(), reverse=True)
        for sequence in sequences:
            manifest = self._manifest(sequence)
            try:
                snapshot = self._read(sequence)
            except _DamagedError as error:
                logger.error(
                    "state %s is damaged and refused: %s; trying the one before (what it alone held is lost)",
                    manifest,
                    error,
                )
                continue
            except StateError:
                raise
            except OSError as error:
                raise StateError(
                    f"state {manifest} cannot be read: {error}. Nothing was changed; start again once the disk and the "
                    "rights to the file are in order"
                ) from error
            newest = sequences[0]
            if sequence != newest:
                self._put_aside(newest)
            # The next state must neither bear a damaged one's number nor take this one's place.
            self._sequence = newest if (newest - sequence) % 2 == 0 else newest + 1
            return snapshot
        if sequences:
            raise StateError(
                f"every state in state_dir {self._folder} is damaged; restore one from a backup, or empty the folder "
                "to start with no probes (labels consumed so far are then forgotten)"
            )
        return None

    def _read(self, sequence: int) -> Snapshot:
        try:
            envelope = json.loads(self._manifest(sequence).read_bytes())
            if _sha256(envelope["body"].encode()) != envelope["sha256"]:
                raise _DamagedError("its checksum does not match")
            document: dict[str, Any] = json.loads(envelope["body"])
            found = document["schema_version"]
            if found != SCHEMA_VERSION:
                raise StateMismatchError(
                    f"state {self._manifest(sequence)} has schema_version {found} and this release reads "
                    f"{SCHEMA_VERSION}; start the release that wrote it, or use another state_dir (with no probes, and "
                    "labels consumed so far forgotten)"
                )
            pieces: dict[str, _Place] = {name: (file, n) for name, (file, n) in document.pop("pieces").items()}
            checksums = document.pop("checksums")
            read = {file: self._read_file(file, checksum) for file, checksum in checksums.items()}
            snapshot = join(document, {name: read[file][number] for name, (file, number) in pieces.items()})
        except FileNotFoundError as error:
            raise _DamagedError(f"{error.filename} is missing") from error
        except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise _DamagedError(f"{type(error).__name__}: {error}") from error
        self._good = {sequence % 2: _Stored(sequence, document, pieces, checksums)}
        return snapshot

    def _write(self, name: str, arrays: Arrays) -> str:
        """Write a file; return its checksum."""
        path = self._folder / name
        save_tensors(path, arrays)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _read_file(self, name: str, checksum: str) -> dict[int, Arrays]:
        """Return the pieces in a file by number."""
        data = (self._folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != checksum:
            raise _DamagedError(f"the checksum of {name} does not match")
        pieces: dict[int, Arrays] = {}
        for key, array in safetensors.numpy.load(data).items():
            number, _, part = key.partition(".")
            pieces.setdefault(int(number), {})[part] = array
        return pieces

    def _put_aside(self, sequence: int) -> None:
        aside = self._folder / f"damaged-{sequence:08d}"
        try:
            aside.mkdir(exist_ok=True)
            for path in self._others():
                path.replace(aside / path.name)
            sync_folder(self._folder)
        except OSError as error:
            raise StateError(f"damaged states cannot be put aside in {aside}: {error}") from error
        logger.error("what is damaged, or belongs to it, was put aside in %s", aside)

    def _manifest(self, sequence: int) -> Path:
        return self._folder / f"state-{sequence:08d}.json"

    def _sequences(self) -> Iterator[int]:
        for path in self._folder.glob("state-*.json"):
            number = path.stem.removeprefix("state-")
            if number.isdecimal():
                yield int(number)

    def _others(self) -> list[Path]:
        """Return what belongs to no good state."""
        kept = {self._manifest(stored.sequence).name for stored in self._good.values()}
        kept |= {file for stored in self._good.values() for file in stored.checksums}
        found = (path for pattern in ("state-*", _HALF_WRITTEN) for path in self._folder.glob(pattern))
        return [path for path in found if path.name not in kept]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
