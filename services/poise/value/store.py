"""The durable state of the value service: two SQLite files that are written in turn.

    <state_dir>/lock               locked while a service uses the folder; contains the mark of that service
    <state_dir>/state-0.sqlite3    the state of the last even save
    <state_dir>/state-1.sqlite3    the state of the last odd save
    <state_dir>/damaged-1/         files that could not be read, kept for inspection

Windows, fitted estimators, pinned steps and consumed ids are saved together, in one transaction. Otherwise a restored
estimator could answer for a step whose labels it has learnt. A save updates the older file and writes only the
difference. If one file is damaged, the other has the state of the previous save.

Every row carries a checksum, because SQLite detects damage only in the structure of a file, not in its values. The
rollback journal (TRUNCATE) is faster here than WAL, which writes every row twice, and keeps the state in one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from poise.errors import Misconfigured
from poise.runtime.files.atomic import commit_file, sync_folder
from poise.value.dedup import ConsumedRun, DedupSnapshot
from poise.value.estimators.diagnostics import ValuedGroup
from poise.value.estimators.features import FeatureMatrix, Label
from poise.value.estimators.interface import Fitted
from poise.value.estimators.probe.model import FittedProbe
from poise.value.estimators.score.model import FittedScore
from poise.value.estimators.step_probes import PinnedProbes, VersionedProbe
from poise_client.types import Estimator

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 5

_SETTINGS = """
PRAGMA page_size = 16384;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = TRUNCATE;
PRAGMA synchronous = FULL;
PRAGMA secure_delete = OFF;
"""

_UNSAFE_SETTINGS = "PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF"
"""For a new file: until it gets its final name, a crash loses nothing."""

# Steps are unsigned 64-bit numbers, which SQLite's INTEGER cannot hold: they are decimal text.
_SCHEMA = (
    "CREATE TABLE document (name TEXT PRIMARY KEY, body TEXT, checksum BLOB)",
    "CREATE TABLE window (domain TEXT, number INTEGER, run_id TEXT, step TEXT, group_id TEXT, prompt_id TEXT, "
    "prompt_hidden BLOB, response_hidden BLOB, entropies BLOB, rewards BLOB, moments BLOB, checksum BLOB, "
    "PRIMARY KEY (domain, number))",
    "CREATE TABLE diagnostics (domain TEXT, number INTEGER, run_id TEXT, step TEXT, predictions BLOB, rewards BLOB, "
    "weighted BLOB, checksum BLOB, PRIMARY KEY (domain, number))",
    "CREATE TABLE probe (domain TEXT, version INTEGER, name TEXT, dtype TEXT, parameters BLOB, checksum BLOB, "
    "PRIMARY KEY (domain, version, name))",
    "CREATE TABLE consumed (run_id TEXT, step TEXT, groups BLOB, checksum BLOB, PRIMARY KEY (run_id, step))",
)

_OTHER_RELEASE = (
    "Start the release that wrote it, or use another state_dir, which starts without probes and without the ids of "
    "consumed labels"
)

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True, eq=False)
class DomainSnapshot:
    """The state of one domain."""

    domain: str
    groups: tuple[Label, ...]
    """The window, oldest first."""
    num_added: int
    """Groups ever added to the window."""
    num_steps_seen: int
    """Distinct (run, step) with a consumed label of this domain."""
    probe: VersionedProbe | None
    valued: tuple[ValuedGroup, ...] = ()
    """`Diagnostics.groups`."""
    num_valued: int = 0
    """Groups ever added to the diagnostics."""
    newest_version: int = 0
    """The newest version of a fitted estimator, also if the domain has another estimator now."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The whole state at one moment. Immutable, so it can be saved in a thread."""

    instance_id: str
    """The consumer's name in the queue. A restart keeps it, so that unacknowledged entries are found again."""
    domains: tuple[DomainSnapshot, ...]
    consumed: DedupSnapshot
    pins: tuple[PinnedProbes, ...]
    """`StepProbes.all`."""
    num_groups_consumed: int
    num_duplicates: int
    newest_entry: str = ""
    """Id of the newest learnt queue entry. If the queue's newest entry is older, labels were lost."""


class StateError(OSError):
    """The state folder cannot be used. The message names the file and the remedy."""


class StateMismatchError(StateError, Misconfigured):
    """The state was written by another release."""


class StateInUseError(StateError):
    """Another process has locked the folder."""


class StateLostError(StateError):
    """This process has lost the lock of the folder."""


class _DamagedError(Exception):
    """A file does not contain what was written."""


class StateStore:
    """The state folder of one service. Not for concurrent saves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self._mark = uuid.uuid4().hex.encode()
        self._files = [_StateFile(folder / f"state-{parity}.sqlite3") for parity in (0, 1)]
        self._sequence = 0
        """Number of the last save. It is in the file of the same parity."""

    def open(self) -> Snapshot | None:
        """Lock the folder and return the newest undamaged state; None if the folder has no state.

        Raises:
            StateInUseError: another process has locked the folder.
            StateError: the folder cannot be read or written, every state is damaged, or another release wrote them.
                The folder is unlocked again and unchanged.
        """
        try:
            self._take_lock()
            return self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files and unlock the folder."""
        for file in self._files:
            file.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save(self, snapshot: Snapshot) -> Path:
        """Save the state, durable on return. Returns its file.

        Raises:
            StateLostError: this process has lost the lock of the folder.
            OSError: it could not be written. The state of the save before is intact.
        """
        self._check_lock()
        sequence = self._sequence + 1
        file = self._files[sequence % 2]
        try:
            file.write(snapshot, sequence, self._check_lock)
        except sqlite3.Error as error:
            if _is_damage(error):
                file.close()  # the next save replaces it
            raise StateError(f"{error}: {file.path}") from error
        self._sequence = sequence
        return file.path

    def _take_lock(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("a+b")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(self._mark)
            self._lock.flush()
        except BlockingIOError:
            raise StateInUseError(
                f"state_dir {self._folder} is in use by another value service. Stop that one or use another state_dir"
            ) from None
        except OSError as error:
            raise StateError(f"state_dir {self._folder} cannot be used: {error}") from error

    def _check_lock(self) -> None:
        """Raise `StateLostError` if the lock file was replaced or has another mark: the file system lost the lock."""
        with contextlib.suppress(OSError):
            if self._lock is not None:
                ours, found = os.fstat(self._lock.fileno()), (self._folder / "lock").stat()
                is_same_file = (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino)
                if is_same_file and os.pread(self._lock.fileno(), len(self._mark) + 1, 0) == self._mark:
                    return
        raise StateLostError(
            f"this service has lost the lock of state_dir {self._folder} and stops writing; another may have it. Check "
            "that the file system supports locks and that nothing removes the lock file"
        )

    def _load(self) -> Snapshot | None:
        if earlier := next(self._folder.glob("state-[0-9]*.json"), None):
            raise StateMismatchError(
                f"{earlier} is a state of an earlier release, which this release cannot read. {_OTHER_RELEASE}"
            )
        snapshot: Snapshot | None = None
        sequences: dict[_StateFile, int] = {}
        damaged: dict[_StateFile, _DamagedError] = {}
        for file in self._files:
            if file.path.exists():
                try:
                    sequences[file] = file.read_sequence()
                except _DamagedError as error:
                    damaged[file] = error
        for file in sorted(sequences, key=sequences.__getitem__, reverse=True):
            try:
                snapshot, self._sequence = file.read(), sequences[file]
                break
            except _DamagedError as error:
                damaged[file] = error
        if damaged and snapshot is None:
            raise StateError(
                f"every state in state_dir {self._folder} is damaged. Restore one from a backup, or empty the folder "
                "to start without probes and without the ids of consumed labels"
            )
        for file, damage in damaged.items():
            aside = self._put_aside(file)
            logger.error("%s; moved to %s. The state of another save is used; newer labels are lost", damage, aside)
        return snapshot

    def _put_aside(self, file: _StateFile) -> Path:
        """Move a damaged file and its journal to a new folder."""
        file.close()
        aside = next(path for n in itertools.count(1) if not (path := self._folder / f"damaged-{n}").exists())
        try:
            aside.mkdir()
            for path in self._folder.glob(f"{file.path.name}*"):
                path.replace(aside / path.name)
            sync_folder(self._folder)
        except OSError as error:
            raise StateError(f"the damaged state {file.path} cannot be moved to {aside}: {error}") from error
        return aside


class _StateFile:
    """One SQLite file with one state."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._saved: Snapshot | None = None
        """The content of the file; None if it is unknown or missing, so the next save must replace the file."""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._saved = None

    def _open(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.executescript(_SETTINGS)

    def _execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        assert self._connection is not None  # noqa: S101
        return self._connection.execute(statement, parameters)

    # Writing.

    def write(self, snapshot: Snapshot, sequence: int, check_lock: Callable[[], None]) -> None:
        """Make the file contain this state: write the difference, or a new file."""
        if self._saved is not None:
            self._commit(snapshot, sequence, check_lock)
        else:
            self.close()
            new = self.path.with_suffix(".new")
            new.unlink(missing_ok=True)
            try:
                self._open(new)
                for statement in (*_UNSAFE_SETTINGS, *_SCHEMA):
                    self._execute(statement)
                self._commit(snapshot, sequence, check_lock)
                self.close()
                # SQLite would roll the new file back with a journal that the old one left behind.
                self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
                check_lock()
                commit_file(new, self.path)
            except BaseException:
                self.close()
                new.unlink(missing_ok=True)
                raise
            self._open(self.path)
        self._saved = snapshot

    def _commit(self, now: Snapshot, sequence: int, check_lock: Callable[[], None]) -> None:
        """Write the difference to the saved state in one transaction."""
        before = self._saved
        self._execute("BEGIN IMMEDIATE")
        try:
            self._write_logs({domain.domain: domain for domain in before.domains} if before else {}, now)
            self._write_probes(_all_probes(before) if before else {}, _all_probes(now))
            self._write_consumed(before.consumed if before else DedupSnapshot(), now.consumed)
            if before is None or before.consumed.retired is not now.consumed.retired:
                self._insert("document", [("retired", json.dumps(now.consumed.retired))])
            self._insert("document", [("state", json.dumps(_document(now, sequence)))])
            check_lock()
            self._execute("COMMIT")
        except BaseException:
            if self._connection is not None and self._connection.in_transaction:
                self._execute("ROLLBACK")
            raise

    def _write_logs(self, before: Mapping[str, DomainSnapshot], now: Snapshot) -> None:
        for domain in now.domains:
            old = before.get(domain.domain)
            num_written = old.num_added if old else 0
            self._write_log("window", domain.domain, num_written, domain.num_added, domain.groups, _label_columns)
            num_written = old.num_valued if old else 0
            self._write_log(
                "diagnostics", domain.domain, num_written, domain.num_valued, domain.valued, _valued_columns
            )

    def _write_log(
        self,
        table: str,
        domain: str,
        num_written: int,
        num_added: int,
        entries: Sequence[_Entry],
        columns: Callable[[_Entry], tuple[Any, ...]],
    ) -> None:
        """Insert the new entries of a log and delete the dropped ones. Numbers are never reused."""
        first = num_added - len(entries)
        new = range(max(first, num_written), num_added)
        self._insert(table, ((domain, number, *columns(entries[number - first])) for number in new))
        # After inserting: a page freed in the same transaction would have to be journaled before it is used again.
        self._execute(f"DELETE FROM {table} WHERE domain = ? AND number < ?", domain, first)  # noqa: S608

    def _write_probes(self, before: _ProbesByVersion, now: _ProbesByVersion) -> None:
        for domain, version in before.keys() - now.keys():
            self._execute("DELETE FROM probe WHERE domain = ? AND version = ?", domain, version)
        for domain, version in now.keys() - before.keys():
            arrays = now[domain, version].probe.arrays()
            rows = ((domain, version, name, array.dtype.str, _bytes(array)) for name, array in arrays.items())
            self._insert("probe", rows)

    def _write_consumed(self, before: DedupSnapshot, now: DedupSnapshot) -> None:
        runs = {run.run_id: run for run in before.runs}
        for run in now.runs:
            old = runs.pop(run.run_id, None)
            if old is run:
                continue
            old_steps = old.steps if old else {}
            for step in old_steps.keys() - run.steps.keys():
                self._execute("DELETE FROM consumed WHERE run_id = ? AND step = ?", run.run_id, str(step))
            changed = ((step, groups) for step, groups in run.steps.items() if old_steps.get(step) is not groups)
            self._insert("consumed", ((run.run_id, str(step), groups) for step, groups in changed))
        for run_id in runs:
            self._execute("DELETE FROM consumed WHERE run_id = ?", run_id)

    def _insert(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Insert rows with checksums. A row may already exist: a failed COMMIT can still be durable."""
        for row in rows:
            marks = ", ".join("?" * (len(row) + 1))
            self._execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", *row, _checksum(row))  # noqa: S608

    # Reading.

    def read_sequence(self) -> int:
        """Return the number of the save that the file contains."""
        with self._read_errors():
            self._open(self.path)
            document = self._document("state")
            if document["schema_version"] != SCHEMA_VERSION:
                raise StateMismatchError(
                    f"state {self.path} has schema_version {document['schema_version']}; this release reads "
                    f"{SCHEMA_VERSION}. {_OTHER_RELEASE}"
                )
            return int(document["sequence"])

    def read(self) -> Snapshot:
        """Return the state in the file."""
        with self._read_errors():
            document = self._document("state")
            arrays: dict[tuple[str, int], dict[str, Any]] = {}
            for domain, version, name, dtype, parameters in self._rows("SELECT * FROM probe"):
                arrays.setdefault((domain, version), {})[name] = np.frombuffer(parameters, dtype)
            probes = {
                (domain, version): VersionedProbe(version, _read_fitted(estimator, arrays[domain, version]), *facts)
                for domain, version, estimator, *facts in document.pop("probes")
            }
            groups, valued = self._read_log("window", _read_label), self._read_log("diagnostics", _read_valued)
            steps: dict[str, dict[int, bytes]] = {}
            for run_id, step, encoded in self._rows("SELECT * FROM consumed"):
                steps.setdefault(run_id, {})[int(step)] = encoded
            for run_id, _, num_steps in document["runs"]:
                if len(steps.setdefault(run_id, {})) != num_steps:
                    raise ValueError(f"{len(steps[run_id])} of {num_steps} steps of a run are in the file")
            domains = [
                DomainSnapshot(
                    name,
                    _last(groups.get(name, {}), num_added, num_groups),
                    num_added,
                    num_steps_seen,
                    None if version is None else probes[name, version],
                    _last(valued.get(name, {}), num_valued, num_kept),
                    num_valued,
                    newest_version,
                )
                for (
                    name,
                    num_added,
                    num_groups,
                    num_steps_seen,
                    version,
                    num_valued,
                    num_kept,
                    newest_version,
                ) in document["domains"]
            ]
            self._saved = Snapshot(
                domains=tuple(domains),
                consumed=DedupSnapshot(
                    tuple(ConsumedRun(run_id, first, steps[run_id]) for run_id, first, _ in document["runs"]),
                    self._document("retired"),
                ),
                pins=tuple(
                    PinnedProbes(
                        run_id,
                        step,
                        {name: probes[name, version] for name, version in versions.items()},
                        None if behind is None else frozenset(behind),
                    )
                    for run_id, step, versions, behind in document["pins"]
                ),
                **document["facts"],
            )
            return self._saved

    def _document(self, name: str) -> Any:
        ((_, body),) = self._rows("SELECT * FROM document WHERE name = ?", name)
        return json.loads(body)

    def _read_log(self, table: str, read: Callable[..., _Entry]) -> dict[str, dict[int, _Entry]]:
        """Return the entries of a log by domain and number."""
        entries: dict[str, dict[int, _Entry]] = {}
        for domain, number, *columns in self._rows(f"SELECT * FROM {table}"):  # noqa: S608
            entries.setdefault(domain, {})[number] = read(domain, *columns)
        return entries

    def _rows(self, query: str, *parameters: str) -> Iterator[list[Any]]:
        """Yield the rows of a query without their checksums."""
        for *columns, checksum in self._execute(query, *parameters):
            if _checksum(columns) != checksum:
                raise ValueError("a checksum does not match")
            yield columns

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        """Turn errors of reading into `_DamagedError` or `StateError`."""
        try:
            yield
        except (sqlite3.Error, ValueError, LookupError, TypeError, AttributeError) as error:
            if not isinstance(error, sqlite3.Error) or _is_damage(error):
                raise _DamagedError(f"state {self.path} is damaged: {error}") from error
            raise StateError(
                f"state {self.path} cannot be read: {error}. Nothing was changed. Repair the disk or the file's "
                "permissions, then start again"
            ) from error


_ProbesByVersion = Mapping[tuple[str, int], VersionedProbe]


def _all_probes(snapshot: Snapshot) -> _ProbesByVersion:
    """Return the current and the pinned probes."""
    probes = {(domain.domain, domain.probe.version): domain.probe for domain in snapshot.domains if domain.probe}
    return probes | {(name, each.version): each for pin in snapshot.pins for name, each in pin.probes.items()}


def _document(snapshot: Snapshot, sequence: int) -> dict[str, Any]:
    """Return the small parts of the state, and row counts, so that a missing row is detected."""
    return {
        "schema_version": SCHEMA_VERSION,
        "sequence": sequence,
        "facts": {
            name: getattr(snapshot, name)
            for name in ("instance_id", "num_groups_consumed", "num_duplicates", "newest_entry")
        },
        "domains": [
            [
                domain.domain,
                domain.num_added,
                len(domain.groups),
                domain.num_steps_seen,
                domain.probe and domain.probe.version,
                domain.num_valued,
                len(domain.valued),
                domain.newest_version,
            ]
            for domain in snapshot.domains
        ],
        "probes": [
            [*key, probe.probe.estimator, probe.num_added, probe.fit_s] for key, probe in _all_probes(snapshot).items()
        ],
        "pins": [
            [
                pin.run_id,
                pin.step,
                {name: probe.version for name, probe in pin.probes.items()},
                None if pin.behind is None else sorted(pin.behind),
            ]
            for pin in snapshot.pins
        ],
        "runs": [[run.run_id, run.first_known_step, len(run.steps)] for run in snapshot.consumed.runs],
    }


def _label_columns(label: Label) -> tuple[Any, ...]:
    arrays = label.features.prompt_hidden, label.features.response_hidden, label.features.entropies, label.rewards
    moments = b"" if label.moments is None else _bytes(label.moments)
    return (label.run_id, str(label.step), label.group_id, label.prompt_id, *map(_bytes, arrays), moments)


def _read_label(domain: str, run_id: str, step: str, group_id: str, prompt_id: str, *columns: bytes) -> Label:
    prompt_hidden, response_hidden, entropies, rewards = (np.frombuffer(array, "<f4") for array in columns[:-1])
    moments = np.frombuffer(columns[-1], "<f8").reshape(rewards.size, -1) if columns[-1] else None
    features = FeatureMatrix(
        prompt_hidden.reshape(rewards.size if moments is None else 1, -1),
        response_hidden.reshape(rewards.size, -1),
        entropies.reshape(rewards.size, -1),
    )
    return Label(run_id, int(step), group_id, domain, features, rewards, prompt_id, moments=moments)


def _valued_columns(group: ValuedGroup) -> tuple[Any, ...]:
    weighted = b"" if group.weighted is None else _bytes(group.weighted)
    return group.run_id, str(group.step), _bytes(group.values), _bytes(group.rewards), weighted


def _read_valued(_: str, run_id: str, step: str, *columns: bytes) -> ValuedGroup:
    values, rewards, weighted = (np.frombuffer(column, "<f4") for column in columns)
    return ValuedGroup(run_id, int(step), values, rewards, weighted.reshape(2, -1) if weighted.size else None)


def _read_fitted(estimator: Estimator, arrays: Mapping[str, NDArray[Any]]) -> Fitted:
    return FittedProbe.from_arrays(arrays) if estimator == "probe" else FittedScore.from_arrays(estimator, arrays)


def _last(entries: Mapping[int, _Entry], num_added: int, num_entries: int) -> tuple[_Entry, ...]:
    """Return the last entries of a log. Raises `LookupError` if one is missing."""
    return tuple(entries[number] for number in range(num_added - num_entries, num_added))


def _bytes(array: NDArray[Any]) -> bytes:
    """Return the little-endian bytes of an array."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _checksum(columns: Iterable[Any]) -> bytes:
    digest = hashlib.sha256()
    for column in columns:
        data = column if isinstance(column, bytes) else str(column).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is damaged. SQLITE_ERROR means that a table is missing."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
