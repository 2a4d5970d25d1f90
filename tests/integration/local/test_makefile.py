"""`make` without the programs that it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[3] / "Makefile"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with an environment, and a place for programs that come before all others."""
    shutil.copy(MAKEFILE, tmp_path)
    script(tmp_path / ".venv" / "bin" / "python", "")
    return tmp_path


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "MAKEFLAGS", "MAKELEVEL")}
    environment |= {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"} | variables
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_missing_prometheus_is_retried_and_fails_under_ci(folder: Path) -> None:
    mark = folder / ".venv" / ".prometheus"
    script(folder / "bin" / "apt-get", "exit 100")
    done = make(folder, ".venv/.prometheus")
    assert (done.returncode, mark.exists()) == (0, False), done.stderr
    assert "will be skipped" in done.stdout
    if shutil.which("promtool", path="/usr/bin:/bin") is None:
        assert make(folder, ".venv/.prometheus", CI="true").returncode != 0
    script(folder / "bin" / "promtool", "")
    assert make(folder, ".venv/.prometheus", CI="true").returncode == 0
    assert not mark.exists()
    script(folder / "bin" / "apt-get", "touch prometheus_2.deb")
    script(folder / "bin" / "dpkg-deb", "")
    assert make(folder, ".venv/.prometheus", CI="true").returncode == 0
    assert mark.exists()


def test_other_systems_are_rejected_before_the_setup(folder: Path) -> None:
    shutil.rmtree(folder / ".venv")
    script(
        folder / "bin" / "python3",
        f"""exec {shutil.which("python3")} -c "
import sys
sys.platform = 'darwin'
exec(sys.argv[1])" "$2" """,
    )
    done = make(folder, ".venv/bin/python")
    assert done.returncode != 0
    assert "Linux is needed" in done.stderr
    assert not (folder / ".venv").exists()


def test_help_explains_another_torch(folder: Path) -> None:
    said = make(folder, "help", "TORCH=torch==2.13.0").stdout
    assert "TORCH='torch==2.13.0' is the requirement that pip installs" in said
