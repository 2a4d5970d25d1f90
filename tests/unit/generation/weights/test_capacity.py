"""The choice of the staging folder, and checks of free disk and memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from poise.errors import BackendDown
from poise.generation.weights import capacity
from poise.generation.weights.capacity import (
    MemoryLock,
    check_free_space,
    choose_folder,
    free_memory_bytes,
    staging_folders,
    trim_memory,
)

ACQUIRE = """
import sys
from poise.generation.weights.capacity import MemoryLock

lock = MemoryLock()
print(lock.try_acquire(), flush=True)
sys.stdin.read()
"""

MEMORY, TEMPORARY = Path("/memory"), Path("/temporary")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the free bytes of each folder; None for a file system without a size."""

    def say(memory: int | None, temporary: int | None) -> None:
        sizes = {MEMORY: memory, TEMPORARY: temporary}
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path: usage._replace(total=0 if sizes[path] is None else 1000, free=sizes[path] or 0),
        )

    return say


@pytest.mark.parametrize(
    ("memory", "temporary", "chosen"),
    [
        (200, 1000, MEMORY),
        (199, 1000, TEMPORARY),
        (None, 1000, MEMORY),
        (199, 150, MEMORY),  # neither fits two: the one with more space
        (64, 99, TEMPORARY),
    ],
)
def test_first_folder_with_space_for_two_versions_is_chosen(
    free: Callable[..., None], memory: int | None, temporary: int, chosen: Path
) -> None:
    free(memory, temporary)
    assert choose_folder([MEMORY, TEMPORARY], 100) == chosen


def test_configured_folder_is_the_only_one(free: Callable[..., None]) -> None:
    assert staging_folders(MEMORY) == [MEMORY]
    free(0, 1000)
    assert choose_folder([MEMORY], 100) == MEMORY


def test_default_folders_are_shared_memory_and_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "memory"
    monkeypatch.setattr(capacity, "_SHARED_MEMORY", memory)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert staging_folders(None) == [tmp_path]
    memory.mkdir()
    assert staging_folders(None) == [memory, tmp_path]


def test_error_about_space_names_folder_and_bytes(free: Callable[..., None]) -> None:
    free(100, None)
    check_free_space(MEMORY, 100)
    check_free_space(TEMPORARY, 10**12)
    with pytest.raises(BackendDown, match="stored in /memory: it needs 101 bytes, and 100 are free") as caught:
        check_free_space(MEMORY, 101)
    assert "staging_dir" in caught.value.remedy


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 1000 - 700 + 30 + 5), ("max", None), ("1000000000000000000", None), (None, None)],
)
def test_free_memory_respects_the_container_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, expected: int | None
) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("700\n")
        (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 30\nactive_file 5\nshmem 65\n")
    assert free_memory_bytes(tmp_path) == (memory.available if expected is None else expected)


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_memory_lock_has_one_owner_at_a_time(temporary_folder: Path) -> None:
    lock, other = MemoryLock(), MemoryLock()
    assert lock.try_acquire()
    assert lock.try_acquire(), "it has the lock"
    assert not other.try_acquire()
    lock.release()
    assert other.try_acquire()
    assert not lock.try_acquire()
    lock.release()
    assert not lock.try_acquire(), "only the other can release it"


def test_memory_lock_ends_with_its_process(temporary_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ACQUIRE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        lock = MemoryLock()
        assert not lock.try_acquire()
        process.kill()
        process.wait()
        assert lock.try_acquire()
    lock.release()


def test_memory_lock_file_is_private_and_not_a_link(temporary_folder: Path) -> None:
    lock = MemoryLock()
    lock.try_acquire()
    lock.release()
    (path,) = temporary_folder.iterdir()
    assert str(os.getuid()) in path.name
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    path.symlink_to(temporary_folder / "elsewhere")
    with pytest.raises(OSError, match=path.name):
        lock.try_acquire()
    assert not (temporary_folder / "elsewhere").exists()


def test_freed_memory_is_returned_to_the_machine() -> None:
    """Frees all blocks but the last. They are too small for mappings of their own, and nothing above is in use."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 64 * 1024, 1000
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:
        libc.free(block)
    before = psutil.Process().memory_info().rss
    trim_memory()
    after = psutil.Process().memory_info().rss
    libc.free(blocks[-1])
    assert before - after > size * count / 2
