"""The state is restored to the last bit, despite damage, crashes, full disks and a lost lock."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.unit.value.harness import full_disk, saved_and_read

from poise.value.dedup import ConsumedRun, DedupSnapshot
from poise.value.estimators.diagnostics import ValuedGroup
from poise.value.estimators.probe.model import FittedProbe, PromptProbe
from poise.value.estimators.step_probes import PinnedProbes, VersionedProbe
from poise.value.store import DomainSnapshot, Snapshot, StateError, StateLostError, StateMismatchError, StateStore

EMPTY = Snapshot("instance", (), DedupSnapshot(), (), 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state"


@pytest.fixture
def numbered(make) -> Callable[[int], Snapshot]:
    """Makes snapshots that differ in their number and their window."""

    def one(number: int) -> Snapshot:
        domain = DomainSnapshot("default", (make.label(number),), number, 1, None)
        return dataclasses.replace(EMPTY, domains=(domain,), num_groups_consumed=number)

    return one


def opened(folder: Path) -> tuple[StateStore, int | None]:
    """Open as a new process would; return the number of the state."""
    store = StateStore(folder)
    snapshot = store.open()
    return store, snapshot and snapshot.num_groups_consumed


def reopened(folder: Path) -> int | None:
    store, number = opened(folder)
    store.close()
    return number


def read(folder: Path) -> Snapshot | None:
    store = StateStore(folder)
    snapshot = store.open()
    store.close()
    return snapshot


def saved(folder: Path, *snapshots: Snapshot) -> list[Path]:
    """Open, save and close; return the files."""
    store, _ = opened(folder)
    paths = [store.save(snapshot) for snapshot in snapshots]
    store.close()
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "lock"}


# The whole state is restored.


def probe(version: int, width: int = 6) -> VersionedProbe:
    weights = {"prompt_hidden": np.arange(width, dtype=np.float64) / version, "entropy": np.full(3, 1 / 3)}
    prompt_only = PromptProbe(np.full(width, 0.1 * version), 1 / 9)
    if version == 5:
        weights["sibling_reward"] = np.full(1, 1 / 11)
        prompt_only = None
    return VersionedProbe(version, FittedProbe(weights, 1 / 7, prompt_only), 3 * version, 0.25)


@pytest.fixture
def snapshot(make) -> Snapshot:
    math, old_math, code = probe(2), probe(1), probe(5, width=9)
    valued = ValuedGroup("run", 2**64 - 1, make.rewards(3), make.rewards(3))
    return Snapshot(
        instance_id="instance",
        domains=(
            DomainSnapshot(
                "math",
                (make.label(0, n=3, domain="math"), make.label(2**63, "h", domain="math")),
                num_added=7,
                num_steps_seen=4,
                probe=math,
                valued=(valued,),
                num_valued=3,
            ),
            DomainSnapshot("code", (make.label(0, run_id="other", domain="code", width=9),), 1, 1, code),
            DomainSnapshot("none.yet", (make.label(1, domain="none.yet"),), 1, 1, None),
        ),
        consumed=DedupSnapshot(
            (ConsumedRun("run", 2, {2: b'{"math":["g","h"]}', 2**63: b"{}"}), ConsumedRun("empty", 0, {})),
            {"old": 3, "older": 2**63},
        ),
        pins=(
            PinnedProbes("run", 0, {}, None),
            PinnedProbes("run", 1, {"math": old_math, "code": code}, frozenset({"math", "none.yet"})),
            PinnedProbes("other", 1, {"math": old_math}, frozenset()),
            PinnedProbes("run", 2**64 - 1, {"math": math}, None),
        ),
        num_groups_consumed=9,
        num_duplicates=2,
        newest_entry="7-1",
    )


def plain(value: object) -> object:
    """Turn a snapshot into plain values that can be compared to the last bit."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return type(value).__name__, [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def test_everything_is_restored_to_the_last_bit(snapshot) -> None:
    assert plain(saved_and_read(snapshot)) == plain(snapshot)


def test_an_empty_state_is_restored() -> None:
    assert plain(saved_and_read(EMPTY)) == plain(EMPTY)


def test_a_probe_pinned_by_many_steps_is_stored_once(snapshot) -> None:
    again = saved_and_read(snapshot)
    pinned = {(pin.run_id, pin.step): pin.probes for pin in again.pins}
    assert pinned["run", 1]["math"] is pinned["other", 1]["math"]
    assert pinned["run", 2**64 - 1]["math"] is again.domains[0].probe


def test_a_new_folder_is_created_and_is_empty(folder) -> None:
    assert reopened(folder) is None
    assert reopened(folder) is None


# Saves write the difference.


def sliding(make) -> list[Snapshot]:
    """States of a sliding window of four groups, and a domain that never changes."""
    groups, still = [make.label(step) for step in range(12)], (make.label(0, domain="still"),)
    valued = [ValuedGroup("run", step, make.rewards(), make.rewards()) for step in range(12)]
    states = []
    for number in range(1, 13):
        steps = {step: b'{"default":["g%d"]}' % step for step in range(number)[-6:]}
        states.append(
            Snapshot(
                "instance",
                (
                    DomainSnapshot(
                        "default",
                        tuple(groups[:number][-4:]),
                        number,
                        number,
                        probe(number + 10),
                        tuple(valued[:number][-3:]),
                        number,
                    ),
                    DomainSnapshot("still", still, 1, 1, None),
                ),
                DedupSnapshot((ConsumedRun(f"run{number // 5}", 0, steps),), {"old": number}),
                (PinnedProbes("run", number, {"default": probe(number)}),),
                number,
                0,
            )
        )
    return states


@pytest.mark.parametrize("restarts", [False, True])
def test_a_state_of_many_saves_is_restored_completely(folder, make, restarts) -> None:
    states = sliding(make)
    store, _ = opened(folder)
    for state in states:
        if restarts:
            store.close()
            store.open()
        store.save(state)
    store.close()
    assert plain(read(folder)) == plain(states[-1])


def test_a_replaced_window_is_restored(folder, make) -> None:
    store, _ = opened(folder)
    states = []
    for num_added, num_kept in ((4, 4), (9, 2), (11, 1), (12, 0)):
        groups = tuple(make.label(step, domain="math") for step in range(num_added - num_kept, num_added))
        states.append(dataclasses.replace(EMPTY, domains=(DomainSnapshot("math", groups, num_added, 1, None),)))
        for _ in range(2):  # once for each file
            store.save(states[-1])
        store.close()
        assert plain(store.open()) == plain(states[-1])
    store.close()


def test_a_save_writes_only_what_has_changed(folder, make) -> None:
    large = tuple(make.label(step, width=4000) for step in range(100))  # 6 MB
    store, _ = opened(folder)
    state = dataclasses.replace(EMPTY, domains=(DomainSnapshot("math", large, 100, 1, None),))
    paths = [store.save(state) for _ in range(2)]
    before = [path.read_bytes() for path in paths]
    state = dataclasses.replace(EMPTY, domains=(DomainSnapshot("math", (*large, make.label(100)), 101, 1, None),))
    for _ in range(2):
        store.save(state)
    store.close()
    for path, old in zip(paths, before, strict=True):
        new = path.read_bytes()
        num_changed = sum(new[at : at + 4096] != old[at : at + 4096] for at in range(0, len(new), 4096))
        assert num_changed * 4096 < len(new) / 10


# Damage.


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


def flip_in_features(path: Path) -> None:
    """Flip one bit of a stored hidden state."""
    connection = sqlite3.connect(path)
    (stored,) = connection.execute("SELECT prompt_hidden FROM window").fetchone()
    connection.close()
    flip(path, path.read_bytes().index(stored) + 5)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "header flipped": lambda path: flip(path, 3),
    "features flipped": flip_in_features,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "another file": lambda path: path.write_bytes(b"SQLite it is not" * 100),
    "a table missing": lambda path: change(path, "DROP TABLE consumed"),
    "the document missing": lambda path: change(path, "DELETE FROM document"),
    "a group missing": lambda path: change(path, "DELETE FROM window"),
    "the document changed": lambda path: change(path, "UPDATE document SET body = replace(body, '1', '2')"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_moved_and_the_previous_one_used(folder, numbered, damage, caplog) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    damage(newest)
    damaged = newest.read_bytes()
    with caplog.at_level(logging.ERROR):
        assert reopened(folder) == 1
    assert f"state {newest} is damaged" in caplog.text
    assert (folder / "damaged-1" / newest.name).read_bytes() == damaged
    assert str(folder / "damaged-1") in caplog.text
    after = saved(folder, numbered(3))[-1]
    assert reopened(folder) == 3
    damage(after)
    assert reopened(folder) == 1  # the undamaged state was kept
    assert (folder / "damaged-2").is_dir()


def test_without_an_undamaged_state_the_folder_is_rejected(folder, numbered) -> None:
    for path in saved(folder, numbered(1), numbered(2)):
        flip_in_features(path)
    before = contents(folder)
    with pytest.raises(StateError, match="Restore one from a backup") as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    assert contents(folder) == before


def test_damage_found_by_a_save_is_repaired_by_the_next(folder, numbered) -> None:
    store, _ = opened(folder)
    paths = [store.save(numbered(number)) for number in (1, 2)]
    paths[0].write_bytes(bytes(paths[0].stat().st_size))
    store.close()
    store = StateStore(folder)
    store.open()
    assert store.save(numbered(3)) == paths[0]
    store.close()
    assert reopened(folder) == 3


@pytest.mark.parametrize("name", ["state-00000042.json", "state-1.json"])
def test_a_state_of_an_earlier_release_is_rejected_by_name(folder, name) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    with pytest.raises(StateMismatchError, match=f"{name} is a state of an earlier release"):
        opened(folder)
    assert contents(folder) == {name: b"{}"}


def test_a_state_of_a_later_release_is_rejected_by_name(folder, numbered) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    connection = sqlite3.connect(newest)
    (body,) = connection.execute("SELECT body FROM document WHERE name = 'state'").fetchone()
    body = json.dumps(json.loads(body) | {"schema_version": 999})
    digest = hashlib.sha256(b"".join(len(x).to_bytes(8, "little") + x for x in (b"state", body.encode()))).digest()
    with connection:
        connection.execute("UPDATE document SET body = ?, checksum = ? WHERE name = 'state'", (body, digest))
    connection.close()
    before = contents(folder)
    with pytest.raises(StateMismatchError, match="has schema_version 999; this release reads"):
        opened(folder)
    assert contents(folder) == before


def test_a_file_that_cannot_be_read_stops_the_service(folder, numbered, caplog) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    aside = newest.rename(newest.with_suffix(".aside"))
    newest.mkdir()
    with pytest.raises(StateError, match="cannot be read: unable to open database file") as caught:
        opened(folder)
    assert str(newest) in str(caught.value)
    assert not caplog.records
    newest.rmdir()
    aside.rename(newest)
    assert reopened(folder) == 2


def test_a_failing_disk_stops_the_service(folder, numbered, monkeypatch, caplog) -> None:
    saved(folder, numbered(1), numbered(2))
    before = contents(folder)

    class Failing(sqlite3.Connection):
        def execute(self, *arguments: object) -> sqlite3.Cursor:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error

    connect = sqlite3.connect
    with monkeypatch.context() as patch, pytest.raises(StateError, match="cannot be read: disk I/O error"):
        patch.setattr(sqlite3, "connect", lambda *arguments, **options: connect(*arguments, factory=Failing, **options))
        opened(folder)
    assert not caplog.records
    assert contents(folder) == before
    assert reopened(folder) == 2


def test_unknown_files_are_neither_read_nor_deleted(folder, numbered) -> None:
    others = ("notes.json", "state-latest.json", "state-9.sqlite3")
    saved(folder, numbered(1))
    for name in others:
        (folder / name).write_text("mine")
    assert reopened(folder) == 1
    saved(folder, numbered(2))
    assert all((folder / name).read_text() == "mine" for name in others)


# The lock.


def test_a_second_service_is_rejected_while_the_first_runs(folder) -> None:
    first, _ = opened(folder)
    with pytest.raises(StateError, match="in use by another value service") as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    first.close()
    reopened(folder)


def test_a_rejected_service_does_not_unlock_the_folder(folder) -> None:
    first, _ = opened(folder)
    second = StateStore(folder)
    for _ in range(2):
        with pytest.raises(StateError):
            second.open()
        second.close()
    with (folder / "lock").open("ab") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.close()


def test_closing_twice_is_harmless(folder) -> None:
    store, _ = opened(folder)
    store.close()
    store.close()


def test_a_path_that_is_not_a_folder_is_rejected_by_name(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file cannot be used"):
        opened(tmp_path / "file")


def take_over(folder: Path) -> None:
    """Lock the folder although it is locked, like a file system that lost the lock."""
    (folder / "lock").write_bytes(b"another")


def replace(folder: Path) -> None:
    (folder / "lock").unlink()
    (folder / "lock").write_bytes(b"another")


@pytest.mark.parametrize("steal", [take_over, replace, lambda folder: (folder / "lock").unlink()])
def test_a_service_that_lost_the_lock_writes_nothing(folder, numbered, steal) -> None:
    store, _ = opened(folder)
    store.save(numbered(1))
    store.save(numbered(2))
    steal(folder)
    before = contents(folder)
    with pytest.raises(StateLostError, match="has lost the lock"):
        store.save(numbered(3))
    assert contents(folder) == before
    store.close()
    assert reopened(folder) == 2


@pytest.mark.parametrize("num_saves", [1, 2])
def test_a_save_that_loses_the_lock_is_not_committed(folder, numbered, monkeypatch, num_saves) -> None:
    store, _ = opened(folder)
    for number in range(1, num_saves + 1):
        store.save(numbered(number))
    dumps = json.dumps

    def slow(*arguments, **options) -> str:
        take_over(folder)
        return dumps(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(StateLostError):
        patch.setattr(json, "dumps", slow)
        store.save(numbered(9))
    store.close()
    assert reopened(folder) == num_saves


# Crashes and full disks.


def test_a_save_on_a_full_disk_fails_and_the_next_succeeds(folder, numbered) -> None:
    store, _ = opened(folder)
    for number in (1, 2, 3):
        with full_disk(), pytest.raises(OSError, match=r"disk.*state-[01].sqlite3"):
            store.save(numbered(10))
        store.save(numbered(number))
    store.close()
    assert reopened(folder) == 3


CRASHING = """
import os, sys
from pathlib import Path
sys.path[:0] = {path}
from poise.value.dedup import DedupSnapshot
from poise.value.store import DomainSnapshot, Snapshot, StateStore
from tests.unit.value.conftest import Maker

make, store = Maker(), StateStore(Path({folder!r}))

def state(number):
    groups = tuple(make.label(step, width=500) for step in range(number))
    return Snapshot("i", (DomainSnapshot("d", groups, number, 1, None),), DedupSnapshot(), (), number, 0)

store.open()
number = 1
while True:
    store.save(state(number))
    os.write(1, b"%d\\n" % number)
    number += 1
"""


def test_a_killed_process_leaves_the_previous_or_the_new_state(folder) -> None:
    """A finished save survives `kill -9`. An unfinished one leaves the old or the new state."""
    code = CRASHING.format(path=sys.path, folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            last = process.stdout.readline()
        process.kill()
        last = ([last, *process.stdout.readlines()])[-1]
    assert reopened(folder) in (int(last), int(last) + 1)


def test_a_crash_at_any_statement_leaves_an_intact_state(tmp_path, make) -> None:
    """Copies the folder at every commit step, as a crash at that moment would leave it, and opens the copy."""
    folder, copies = tmp_path / "state", tmp_path / "copies"
    copies.mkdir()
    states = sliding(make)
    store, _ = opened(folder)

    class Copying(sqlite3.Connection):
        def execute(self, statement: str, *arguments: object) -> sqlite3.Cursor:
            answer = super().execute(statement, *arguments)
            shutil.copytree(folder, copies / f"{len(list(copies.iterdir())):04d}-{number}")
            return answer

    connect = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *arguments, **options: connect(*arguments, factory=Copying, **options))
        for number in range(1, 6):  # `Copying` reads it
            store.save(states[number - 1])
    store.close()
    found = []
    for copy in sorted(copies.iterdir()):
        saving = int(copy.name.split("-")[1])
        again = read(copy)
        number = again.num_groups_consumed if again else 0
        assert number in (saving - 1, saving)
        assert again is None or plain(again) == plain(states[number - 1])
        found.append(number)
    assert found == sorted(found)
    assert len(found) > 20


def test_a_half_written_new_file_is_ignored_and_replaced(folder, numbered) -> None:
    saved(folder, numbered(1))
    (folder / "state-0.new").write_bytes(b"half")
    assert reopened(folder) == 1
    saved(folder, numbered(2))
    assert reopened(folder) == 2
    assert not (folder / "state-0.new").exists()
