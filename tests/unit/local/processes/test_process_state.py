"""The state of a process that does not respond."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from poise.local.processes.supervisor import process_state


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Path]:
    """A folder that a supervisor holds."""
    with (tmp_path / "supervisor.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def note_pid(folder: Path, created: float) -> None:
    (folder / "pids.json").write_text(json.dumps({"learner": [os.getpid(), created]}))


def test_running_process_is_starting(supervised: Path) -> None:
    note_pid(supervised, psutil.Process().create_time())
    state = process_state(supervised, "learner", Path("learner.log"))
    assert state.startswith(("starting, ", "running, but does not respond, "))
    assert state.endswith(" s; log: learner.log")


@pytest.mark.parametrize("pids", ["{}", "{not json", '{"learner": [999999999, 0]}', '{"learner": []}', "[]"])
def test_missing_process_has_exited(supervised: Path, pids: str) -> None:
    (supervised / "pids.json").write_text(pids)
    state = process_state(supervised, "learner", Path("learner.log"))
    assert state == "exited, and is being restarted; log: learner.log"


def test_reused_process_id_counts_as_exited(supervised: Path) -> None:
    note_pid(supervised, 0.0)
    assert process_state(supervised, "learner", Path("learner.log")).startswith("exited")


def test_without_a_supervisor_nothing_is_running(tmp_path: Path) -> None:
    assert process_state(tmp_path, "learner", Path("learner.log")) == "is not running. Start it with `poise up`"
    (tmp_path / "supervisor.lock").touch()
    note_pid(tmp_path, psutil.Process().create_time())
    assert process_state(tmp_path, "learner", Path("learner.log")) == "is not running. Start it with `poise up`"
