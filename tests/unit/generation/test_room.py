"""Which folder a push is collected in, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from poise.errors import BackendDown
from poise.generation import room
from poise.generation.room import choose_folder, free_memory_bytes, refuse_unless_room, staging_folders

MEMORY, TEMPORARY = Path("/memory"), Path("/temporary")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says how many bytes are free in each folder; None for a file system that has no size."""

    def say(memory: int | None, temporary: int | None) -> None:
        sizes = {MEMORY: memory, TEMPORARY: temporary}
        usage = room.shutil.disk_usage("/")
        monkeypatch.setattr(
            room.shutil,
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
