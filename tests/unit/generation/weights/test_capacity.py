"""Which folder a push is collected in, and when it is refused."""

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
from poise.generation.weights import capacity as room
from poise.generation.weights.capacity import (
    MemoryTurn,
    choose_folder,
    free_memory_bytes,
    refuse_unless_room,
    return_freed_memory,
    staging_folders,
)

TAKE_THE_TURN = """
import sys
from poise.generation.weights.capacity import MemoryTurn

turn = MemoryTurn()
print(turn.take(), flush=True)
sys.stdin.read()
"""

MEMORY, TEMPORARY = Path("/memory"), Path("/temporary")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says how many bytes are free in each folder; None for a file system that has no size."""

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
        (199, 150, MEMORY),  # neither has room for two: the roomier
        (64, 99, TEMPORARY),
    ],
)
def test_the_first_folder_with_room_for_two_versions_is_chosen(
    free: Callable[..., None], memory: int | None, temporary: int, chosen: Path
) -> None:
    free(memory, temporary)
    assert choose_folder([MEMORY, TEMPORARY], 100) == chosen


def test_a_folder_that_is_named_is_the_only_one(free: Callable[..., None]) -> None:
    assert staging_folders(MEMORY) == [MEMORY]
    free(0, 1000)
    assert choose_folder([MEMORY], 100) == MEMORY


def test_folders_of_the_machine_are_shared_memory_and_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    monkeypatch.setattr(room, "_SHARED_MEMORY", memory)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert staging_folders(None) == [tmp_path]
    memory.mkdir()
    assert staging_folders(None) == [memory, tmp_path]


def test_what_does_not_fit_is_refused_with_folder_and_bytes(free: Callable[..., None]) -> None:
    free(100, None)
    refuse_unless_room(MEMORY, 100)
    refuse_unless_room(TEMPORARY, 10**12)
    with pytest.raises(BackendDown, match="stored in /memory: it takes 101 bytes, and 100 are free") as caught:
        refuse_unless_room(MEMORY, 101)
    assert "staging_dir" in caught.value.remedy


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 1000 - 700 + 30 + 5), ("max", None), ("1000000000000000000", None), (None, None)],
)
def test_memory_is_that_of_the_machine_or_of_a_container_with_less(
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


def test_memory_is_taken_by_one_at_a_time(temporary_folder: Path) -> None:
    turn, other = MemoryTurn(), MemoryTurn()
    assert turn.take()
    assert turn.take(), "it has the turn"
    assert not other.take()
    turn.give_back()
    assert other.take()
    assert not turn.take()
    turn.give_back()
    assert not turn.take(), "that was the other's to give"


def test_who_dies_loses_the_turn(temporary_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_THE_TURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        turn = MemoryTurn()
        assert not turn.take()
        process.kill()
        process.wait()
        assert turn.take()
    turn.give_back()


def test_the_turns_file_is_the_users_own_and_no_link(temporary_folder: Path) -> None:
    turn = MemoryTurn()
    turn.take()
    turn.give_back()
    (path,) = temporary_folder.iterdir()
    assert str(os.getuid()) in path.name
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    path.symlink_to(temporary_folder / "elsewhere")
    with pytest.raises(OSError, match=path.name):
        turn.take()
    assert not (temporary_folder / "elsewhere").exists()


def test_what_was_freed_is_returned_to_the_machine() -> None:
    """Of blocks too small for a mapping of their own, all are freed but the last, above which nothing is in use."""
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
    return_freed_memory()
    after = psutil.Process().memory_info().rss
    libc.free(blocks[-1])
    assert before - after > size * count / 2
