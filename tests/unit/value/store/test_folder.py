"""The state folder against damage, crashes and second owners."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.numpy

from poise.value.dedup import LedgerSnapshot
from poise.value.store.folder import StateError, StateLostError, StateStore
from poise.value.store.snapshot import DomainSnapshot, Snapshot

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state"


@pytest.fixture
def numbered(make) -> Callable[[int], Snapshot]:
    """Makes snapshots that are told apart by their number."""

    def one(number: int) -> Snapshot:
        domain = DomainSnapshot("default", (make.label(number),), number, 1, None)
        return Snapshot("instance", (domain,), LedgerSnapshot(), (), number, 0)

    return one


def opened(folder: Path) -> tuple[StateStore, int | None]:
    """Open as a process started afresh would; returns the number of the state found."""
    store = StateStore(folder)
    snapshot = store.open()
    return store, snapshot and snapshot.num_groups_consumed


def reopened(folder: Path) -> int | None:
    store, number = opened(folder)
    store.close()
    return number


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("state-*")}


def pieces_of(manifest: Path) -> set[str]:
    """The files that a state refers to."""
    return set(json.loads(json.loads(manifest.read_text())["body"])["checksums"])


def saved(folder: Path, *snapshots: Snapshot) -> list[Path]:
    """Open, save and close; returns the committing files."""
    store, _ = opened(folder)
    paths = [store.save(snapshot) for snapshot in snapshots]
    store.close()
    return paths


def test_a_new_folder_is_made_and_holds_nothing(folder) -> None:
    assert reopened(folder) is None
    assert reopened(folder) is None


def test_the_newest_state_comes_back_with_its_arrays(folder, numbered) -> None:
    snapshots = [numbered(number) for number in (1, 2, 3)]
    saved(folder, *snapshots)
    store = StateStore(folder)
    again = store.open()
    store.close()
    assert again.num_groups_consumed == 3
    mine, theirs = snapshots[2].domains[0].groups[0], again.domains[0].groups[0]
    assert mine.rows.prompt_hidden.tobytes() == theirs.rows.prompt_hidden.tobytes()
    assert mine.rewards.tobytes() == theirs.rewards.tobytes()


def test_only_the_last_two_states_are_kept_also_over_restarts(folder, numbered) -> None:
    for number in range(1, 5):
        saved(folder, numbered(number))
    assert {path.name for path in folder.iterdir()} == {"lock", *names(folder)}
    assert {name for name in names(folder) if name.endswith(".json")} == {"state-00000003.json", "state-00000004.json"}
    # Each life wrote all of its state, for it knew the pieces of none with as odd a number.
    assert {name.split(".")[0] for name in names(folder)} == {"state-00000003", "state-00000004"}


def growing(make, number: int) -> Snapshot:
    """A window to which a group is added each time, of one domain; and another one that never changes."""
    groups, still = tuple(make.label(step) for step in range(number)), (make.label(0, domain="still"),)
    domains = DomainSnapshot("default", groups, number, 1, None), DomainSnapshot("still", still, 1, 1, None)
    return Snapshot("instance", domains, LedgerSnapshot(), (), number, 0)


def test_a_save_writes_what_is_new_and_shares_no_file_with_the_state_before(folder, make) -> None:
    store, _ = opened(folder)
    used = [pieces_of(store.save(growing(make, number))) for number in range(1, 7)]
    store.close()
    for number, (before, after) in enumerate(itertools.pairwise(used), 1):
        assert not before & after, number
    for before, after in zip(used, used[2:], strict=False):
        assert len(after - before) == 1  # the groups added since
        assert before < after
    assert names(folder) == {"state-00000005.json", "state-00000006.json"} | used[-1] | used[-2]
    assert reopened(folder) == 6


def test_a_state_made_of_pieces_of_many_saves_comes_back_whole(folder, make) -> None:
    store, _ = opened(folder)
    whole = growing(make, 6)
    for number in range(1, 7):
        domain, still = whole.domains
        part = dataclasses.replace(domain, groups=domain.groups[:number][-4:], num_added=number)
        store.save(dataclasses.replace(whole, domains=(part, still), num_groups_consumed=number))
    store.close()
    last = StateStore(folder)
    again = last.open()
    last.close()
    assert again is not None
    groups = again.domains[0].groups
    assert [group.step for group in groups] == [2, 3, 4, 5]
    for mine, theirs in zip(whole.domains[0].groups[-4:], groups, strict=True):
        assert mine.rows.prompt_hidden.tobytes() == theirs.rows.prompt_hidden.tobytes()


# Damage.


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def tensors(path: Path) -> Path:
    """The largest piece of a state."""
    return max(path.parent.glob(f"{path.stem}.*.safetensors"), key=lambda piece: piece.stat().st_size)


def of_another_release(path: Path) -> None:
    envelope = json.loads(path.read_text())
    body = json.dumps(json.loads(envelope["body"]) | {"schema_version": 999})
    path.write_text(json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}))


DAMAGES: dict[str, Damage] = {
    "manifest flipped": lambda path: flip(path, 200),
    "manifest cut": lambda path: os.truncate(path, 100),
    "manifest empty": lambda path: os.truncate(path, 0),
    "manifest is no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "manifest is another document": lambda path: path.write_text("[1]"),
    "tensors flipped": lambda path: flip(tensors(path), -3),
    "tensors cut": lambda path: os.truncate(tensors(path), tensors(path).stat().st_size - 1),
    "tensors empty": lambda path: os.truncate(tensors(path), 0),
    "tensors missing": lambda path: tensors(path).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(folder, numbered, damage, caplog) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    damage(newest)
    with caplog.at_level(logging.ERROR):
        assert reopened(folder) == 1
    record = caplog.records[0]
    assert str(newest) in record.getMessage()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_after_damage_saving_goes_on_and_the_good_state_is_kept_beside(folder, numbered, damage) -> None:
    damage(saved(folder, numbered(1), numbered(2))[-1])
    after = saved(folder, numbered(3))[-1]
    assert reopened(folder) == 3
    damage(after)
    assert reopened(folder) == 1


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_put_aside_and_not_deleted(folder, numbered, damage, caplog) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    damage(newest)
    before = {path.name: path.read_bytes() for path in folder.glob("state-00000002.*")}
    with caplog.at_level(logging.ERROR):
        saved(folder, numbered(3), numbered(4), numbered(5))
    aside = folder / "damaged-00000002"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert str(aside) in caplog.text


def test_only_damaged_states_stop_the_service_with_a_remedy_and_are_left_alone(folder, numbered) -> None:
    for path in saved(folder, numbered(1), numbered(2)):
        flip(path, 200)
    before = {path: path.read_bytes() for path in folder.glob("state-*")}
    with pytest.raises(StateError, match="restore one from a backup") as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    assert {path: path.read_bytes() for path in folder.glob("state-*")} == before


def test_a_state_of_another_release_is_refused_as_such_and_left_alone(folder, numbered) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    of_another_release(newest)
    before = {path: path.read_bytes() for path in folder.glob("state-*")}
    with pytest.raises(StateError, match="has schema_version 999 and this release reads") as caught:
        opened(folder)
    assert str(newest) in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.glob("state-*")} == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_state_that_cannot_be_read_stops_the_service_and_nothing_is_changed(
    folder, numbered, monkeypatch, suffix, number, caplog
) -> None:
    newest = saved(folder, numbered(1), numbered(2))[-1]
    before = {path: path.read_bytes() for path in folder.glob("state-*")}
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name.startswith(newest.stem) and path.suffix == suffix:
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    with monkeypatch.context() as patch, pytest.raises(StateError, match=os.strerror(number)) as caught:
        patch.setattr(Path, "read_bytes", failing)
        opened(folder)
    assert str(newest) in str(caught.value)
    assert not caplog.records
    assert {path: path.read_bytes() for path in folder.glob("state-*")} == before
    assert reopened(folder) == 2


def test_files_of_others_are_neither_read_nor_dropped(folder, numbered) -> None:
    saved(folder, numbered(1))
    (folder / "notes.json").write_text("mine")
    (folder / "state-latest.json").write_text("{}")
    assert reopened(folder) == 1
    saved(folder, numbered(2))
    assert (folder / "notes.json").read_text() == "mine"


# The lock.


def test_a_second_service_is_refused_while_the_first_runs_and_not_after(folder) -> None:
    first, _ = opened(folder)
    with pytest.raises(StateError, match="in use by another value service") as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    first.close()
    reopened(folder)


def test_a_refused_service_does_not_take_the_lock_from_the_first(folder) -> None:
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


def test_a_path_that_is_no_folder_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file cannot be used"):
        opened(tmp_path / "file")


def stolen_by_another(folder: Path) -> None:
    """As when a file system gives a lock away: another takes the folder while we believe to have it."""
    (folder / "lock").write_bytes(b"another")


def replaced(folder: Path) -> None:
    (folder / "lock").unlink()
    saved(folder)


@pytest.mark.parametrize("steal", [stolen_by_another, replaced, lambda folder: (folder / "lock").unlink()])
def test_who_lost_the_lock_writes_nothing_any_more(folder, numbered, steal) -> None:
    store, _ = opened(folder)
    store.save(numbered(1))
    store.save(numbered(2))
    steal(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StateLostError, match="is not this service's any more"):
        store.save(numbered(3))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    store.close()
    assert reopened(folder) == 2


def test_who_loses_the_lock_during_a_save_does_not_commit_it(folder, numbered, monkeypatch) -> None:
    store, _ = opened(folder)
    store.save(numbered(1))
    write = safetensors.numpy.save_file

    def slow(*arguments) -> None:
        write(*arguments)
        stolen_by_another(folder)

    monkeypatch.setattr(safetensors.numpy, "save_file", slow)
    with pytest.raises(StateLostError):
        store.save(numbered(2))
    store.close()
    assert reopened(folder) == 1


# Crashes.


class Crash(BaseException):
    """Ends the process here; nothing after it runs."""


def crash_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> Callable[[], int]:
    """Crash instead of the nth call into the file system that matters; returns a counter of the calls."""
    calls = 0

    def guarded(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise Crash
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(safetensors.numpy, "save_file", guarded(safetensors.numpy.save_file))
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))
    for method in ("replace", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, method, guarded(getattr(Path, method)))
    return lambda: calls


def calls_of_a_save(tmp_path: Path, numbered: Callable[[int], Snapshot]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        store, _ = opened(tmp_path / "counted")
        for number in (1, 2):
            store.save(numbered(number))
        count = crash_at(patch, 0)
        store.save(numbered(3))
        store.close()
        return count()


def test_a_crash_between_any_two_writes_leaves_the_old_state_or_the_new_one(tmp_path, numbered) -> None:
    num_calls = calls_of_a_save(tmp_path, numbered)
    assert num_calls >= 8  # pieces, manifest: written, synced, renamed, the folder synced; old files dropped
    found = []
    for nth in range(1, num_calls + 1):
        folder = tmp_path / str(nth)
        store, _ = opened(folder)
        for number in (1, 2):
            store.save(numbered(number))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            crash_at(patch, nth)
            store.save(numbered(3))
        store.close()
        found.append(reopened(folder))
        saved(folder, numbered(4))
        assert reopened(folder) == 4
        manifests = sorted(folder.glob("state-*.json"))
        assert len(manifests) == 2
        assert names(folder) == {path.name for path in manifests}.union(*map(pieces_of, manifests))
    assert found == sorted(found)  # once committed, it stays
    assert set(found) == {2, 3}


def test_a_half_written_file_is_not_taken_for_a_state_and_is_swept_away(folder, numbered) -> None:
    saved(folder, numbered(1))
    leftovers = ("state-00000002.7.safetensors", "state-00000002.json.tmp")
    for name in leftovers:
        (folder / name).write_bytes(b"half")
    assert reopened(folder) == 1
    saved(folder, numbered(2))
    assert reopened(folder) == 2
    assert not [name for name in leftovers if (folder / name).exists()]


def test_a_failed_save_leaves_the_state_and_the_next_one_succeeds(folder, numbered, monkeypatch) -> None:
    store, _ = opened(folder)
    store.save(numbered(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            store.save(numbered(2))
    assert store.save(numbered(3)).exists()
    store.close()
    assert reopened(folder) == 3


@contextmanager
def no_room_for(num_bytes: int) -> Iterator[None]:
    """What the system refuses to write beyond so many bytes of a file: as real a refusal as a full disk's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_without_room_are_an_error_of_the_system_and_the_next_save_succeeds(folder, numbered) -> None:
    store, _ = opened(folder)
    store.save(numbered(1))
    with no_room_for(100), pytest.raises(OSError, match="File too large") as caught:
        store.save(numbered(2))
    assert caught.value.errno == errno.EFBIG
    assert store.save(numbered(3)).exists()
    store.close()
    assert reopened(folder) == 3


def test_what_safetensors_left_half_written_when_it_was_killed_is_swept_away_and_nothing_else(folder, numbered) -> None:
    saved(folder, numbered(1))
    (folder / ".tmpQvDMfi").write_bytes(b"half")
    others = (".tmp", ".tmpnotes.txt", ".tmpABCDEFG", "tmpQvDMfi", ".tmp-12345")
    for name in others:
        (folder / name).write_text("mine")
    saved(folder, numbered(2))
    assert not (folder / ".tmpQvDMfi").exists()
    assert all((folder / name).exists() for name in others)
