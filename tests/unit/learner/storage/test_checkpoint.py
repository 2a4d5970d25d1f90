import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from poise.learner.storage import checkpoint as module
from poise.learner.storage.checkpoint import CheckpointStore, Progress, StateError


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def content(count: int) -> tuple[Progress, dict[str, torch.Tensor], set[bytes]]:
    progress = Progress(count, count * 2, count, count * 6, {"stale": count}, f"step-{count}")
    tensors = {"model.a": torch.full((3, 2), float(count)), "step.a": torch.tensor(float(count))}
    return progress, tensors, {bytes([i] * 16) for i in range(count)}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def open_store(folder) -> Iterator[Callable[..., CheckpointStore]]:
    """Opens the folder as a new process would after the previous one died."""
    opened: list[CheckpointStore] = []

    def open_store(keep: int = 2) -> CheckpointStore:
        for store in opened:
            store.close()
        opened.append(CheckpointStore(folder, keep))
        opened[-1].open()
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store) -> CheckpointStore:
    return open_store()


def assert_holds(store: CheckpointStore, count: int) -> None:
    loaded = store.load()
    progress, tensors, seen = content(count)
    assert (loaded.progress, loaded.seen) == (progress, seen)
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)


def test_newest_checkpoint_is_loaded_unchanged(store):
    assert store.load() is None
    for count in (0, 1, 5):
        store.save(*content(count))
        assert_holds(store, count)


def test_only_the_newest_checkpoints_are_kept(store, folder):
    for count in range(5):
        assert store.save(*content(count)).is_dir()
    assert store.sequences() == [3, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-00000003", "checkpoint-00000004", "lock"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "seen.safetensors", "state.json"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(store, folder, name, caplog):
    store.save(*content(1))
    store.save(*content(2))
    path = folder / "checkpoint-00000002"
    spare = folder.parent / "spare"
    shutil.copytree(path, spare)
    whole = (path / name).read_bytes()
    damages = [whole[:-1], b"", None]
    damages += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 5)]
    for damage in damages:
        shutil.rmtree(folder / "damaged-checkpoint-00000002", ignore_errors=True)
        shutil.copytree(spare, path, dirs_exist_ok=True)
        if damage is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(damage)
        if damage is not None and _reads_like(damage, whole, name):
            continue
        assert_holds(store, 1)
        assert "checkpoint-00000002 is damaged: " in caplog.text


def _reads_like(damage: bytes, whole: bytes, name: str) -> bool:
    """Other white space in JSON is no damage, and the schema version is checked first."""
    if name != "state.json":
        return False
    try:
        values = json.loads(damage)
    except ValueError:
        return False
    return values == json.loads(whole) or values.get("schema_version", module.SCHEMA_VERSION) != module.SCHEMA_VERSION


def test_damaged_checkpoints_do_not_count_as_kept(store, folder):
    for count in (1, 2):
        store.save(*content(count))
    (folder / "checkpoint-00000002" / "state.json").unlink()
    assert_holds(store, 1)
    store.save(*content(3))
    assert store.sequences() == [1, 3]
    (folder / "checkpoint-00000003" / "state.json").unlink()
    assert_holds(store, 1)


def test_only_damaged_checkpoints_are_an_error(store, folder):
    store.save(*content(1))
    (folder / "checkpoint-00000001" / "tensors.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(StateError, match=r"every checkpoint in state_dir .* is damaged. Restore"):
            store.load()


def test_checkpoint_of_another_release_is_named_and_kept(store, folder, monkeypatch):
    store.save(*content(1))
    monkeypatch.setattr(module, "SCHEMA_VERSION", 3)
    store.save(*content(2))
    monkeypatch.undo()
    with pytest.raises(StateError, match="has schema_version 3, but this release reads 1 and 2"):
        store.load()
    assert store.sequences() == [1, 2]


def test_checkpoint_of_schema_1_without_origin_is_read(store, folder):
    store.save(*content(1))
    path = folder / "checkpoint-00000001" / "state.json"
    state = json.loads(path.read_text())
    assert state["schema_version"] == 2  # older releases must reject it by its version, not as damage
    del state["progress"]["origin"]
    digest = hashlib.sha256(json.dumps(state["progress"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(state | {"schema_version": 1, "sha256": state["sha256"] | {"progress": digest}}))
    assert_holds(store, 1)
    assert store.load().progress.origin == {}


def test_second_learner_cannot_lock_the_folder(store, folder):
    other = CheckpointStore(folder, keep=2)
    with pytest.raises(StateError, match=r"in use by another learner\. Stop that one, or use another state_dir"):
        other.open()
    store.close()
    other.open()
    other.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"file/state cannot be used"):
        CheckpointStore(tmp_path / "file" / "state", keep=1).open()


def kill_at(monkeypatch, call: int) -> list[int]:
    """Let the process die before its n-th change of the disk. Return a counter of changes."""
    made = [0]

    def counted(work):
        def run(*args, **kwargs):
            if made[0] == call:
                raise Killed
            made[0] += 1
            return work(*args, **kwargs)

        return run

    for target, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "write_text"),
        (module.shutil, "rmtree"),
        (module.safetensors.torch, "save_file"),
        (module.safetensors.numpy, "save_file"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(target, name, counted(getattr(target, name)))
    return made


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_while_saving_leaves_an_intact_checkpoint(folder, open_store, monkeypatch, keep):
    found = set()
    for call in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        store = open_store(keep)
        store.save(*content(1))
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            try:
                store.save(*content(2))
            except Killed:
                killed = True
            else:
                killed = False
        store = open_store(keep)
        count = store.load().progress.num_batches
        assert_holds(store, count)
        found.add(count)
        store.save(*content(3))  # saving still works
        assert_holds(store, 3)
        assert not list(folder.glob("writing-*"))
        if not killed:
            break
    assert found == {1, 2}
    assert call > 8


def test_intact_checkpoint_is_not_written_again(store, open_store, monkeypatch):
    """Otherwise a kill between deleting the old one and renaming the new one would lose both."""
    path = store.save(*content(1))
    for restart in (False, True):
        if restart:
            store = open_store()
            store.load()
        with monkeypatch.context() as patch:
            made = kill_at(patch, 0)
            assert store.save(*content(1)) == path
            assert made == [0]


def test_damaged_checkpoint_is_written_again(store, open_store, folder):
    store.save(*content(1))
    store.save(*content(2))
    store = open_store()
    (folder / "checkpoint-00000002" / "state.json").unlink()
    assert_holds(store, 1)
    store.save(*content(2))
    assert_holds(store, 2)


def test_lineage_id_is_stable_until_a_new_lineage(store, open_store):
    name = store.lineage()
    assert name
    assert open_store().lineage() == name
    newer = store.new_lineage()
    assert newer != name
    assert open_store().lineage() == newer


@contextmanager
def no_room_beyond(num_bytes: int) -> Iterator[None]:
    """Limit the size of files: the operating system then fails larger writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 4096], ids=["tensors", "seen"])
def test_full_disk_raises_and_leaves_no_new_checkpoint(store, folder, limit):
    store.save(*content(1))
    progress, tensors, seen = content(2)
    seen = {i.to_bytes(16) for i in range(1000)}
    with no_room_beyond(limit), pytest.raises(OSError, match="File too large"):
        store.save(progress, tensors, seen)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-00000001", "lock"]
    assert_holds(store, 1)
    store.save(*content(2))
    assert_holds(store, 2)
