from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from poise.runtime.files import scratch
from poise.runtime.files.scratch import ScratchFolder


def test_folder_exists_until_closed(tmp_path: Path) -> None:
    folder = ScratchFolder(tmp_path / "new", "ours-")
    path = folder.ensure()
    assert path.parent == tmp_path / "new"
    assert path.stat().st_mode & 0o077 == 0
    assert folder.ensure() == path
    (path / "sub").mkdir()
    (path / "sub" / "file").write_bytes(b"x")
    folder.close()
    folder.close()
    assert list((tmp_path / "new").iterdir()) == []


def test_removed_folder_is_created_again(tmp_path: Path) -> None:
    folder = ScratchFolder(tmp_path, "ours-")
    folder.ensure().rmdir()
    path = folder.ensure()
    scratch.remove_leftovers(tmp_path, "ours-")
    assert path.is_dir()
    folder.close()


def test_only_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom poise.runtime.files.scratch import ScratchFolder\n"
        f"folder = ScratchFolder(Path({str(tmp_path)!r}), 'ours-')\n"
        "(folder.ensure() / 'weights').write_bytes(b'x' * 12)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    living = ScratchFolder(tmp_path, "ours-")
    ours = living.ensure()
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    (tmp_path / "another's").mkdir()
    (tmp_path / "ours-file").write_bytes(b"")
    assert len(list(tmp_path.glob("ours-*/weights"))) == 1
    scratch.remove_leftovers(tmp_path, "ours-")
    assert sorted(tmp_path.iterdir()) == sorted([ours, tmp_path / "another's", tmp_path / "ours-file"])
    living.close()


def test_folder_removed_before_its_lock_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = scratch.fcntl.flock
    taken: list[Path] = []

    def steal_first(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(scratch.fcntl, "flock", steal_first)
    folder = ScratchFolder(tmp_path, "ours-")
    path = folder.ensure()
    assert path.is_dir()
    assert path != taken[0]
    folder.close()


def test_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "ours-x").symlink_to(tmp_path / "precious")
    scratch.remove_leftovers(tmp_path / "parent", "ours-")
    assert (tmp_path / "precious" / "file").exists()


def test_missing_parent_has_no_leftovers(tmp_path: Path) -> None:
    scratch.remove_leftovers(tmp_path / "nowhere", "ours-")
