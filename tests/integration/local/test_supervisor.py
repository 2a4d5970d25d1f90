"""The supervisor with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from poise.local.process import ProcessSpec
from poise.local.supervisor import Supervisor, SupervisorError

DEADLINE_S = 30.0

SLEEPER = "import time; time.sleep(600)"


def spec(name: str, code: str, folder: Path) -> ProcessSpec:
    return ProcessSpec(name, [sys.executable, "-c", code], folder / f"{name}.log")


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def pids_of(marker: str) -> set[int]:
    found = set()
    for process in psutil.process_iter():
        try:
            if any(marker in part for part in process.cmdline()) and process.pid != os.getpid():
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


async def test_what_dies_is_started_again_and_all_end_together(tmp_path: Path) -> None:
    marker = f"# {tmp_path}"
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", f"{SLEEPER} {marker}", tmp_path)])
        await until(lambda: len(pids_of(marker)) == 1)
        (first,) = pids_of(marker)
        os.kill(first, signal.SIGKILL)
        await until(lambda: bool(pids_of(marker) - {first}))
        assert supervisor.num_restarts == {"one": 1}
    assert not pids_of(marker)


async def test_grandchildren_end_with_their_parent(tmp_path: Path) -> None:
    marker = f"# {tmp_path}"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{SLEEPER} {marker} grandchild''']) {marker}"
    )
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", parent, tmp_path)])
        await until(lambda: len(pids_of(f"{marker} grandchild")) >= 2)
    await until(lambda: not pids_of(marker))


async def test_a_process_that_cannot_live_is_given_up_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poise.local.supervisor._LAST_BACKOFF_S", 0.01)
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", "import sys; sys.exit('cannot find the moon')", tmp_path)])
        with pytest.raises(SupervisorError) as caught:
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)
    assert "one exited with status 1, 7 times in a row" in str(caught.value)
    assert str(tmp_path / "one.log") in str(caught.value)
    assert "cannot find the moon" in str(caught.value)


async def test_wrong_settings_are_not_tried_twice(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", "import sys; print('port: wrong'); sys.exit(2)", tmp_path)])
        with pytest.raises(SupervisorError, match="port: wrong"):
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)
        assert supervisor.num_restarts == {}


async def test_a_second_supervisor_is_refused(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services"):
        with pytest.raises(SupervisorError, match="up already"):
            await Supervisor(tmp_path / "services").__aenter__()


async def test_training_killed_by_a_signal_is_started_again_and_its_status_returned(tmp_path: Path) -> None:
    once = tmp_path / "once"
    code = textwrap.dedent(f"""
        import os, pathlib, sys
        once = pathlib.Path({str(once)!r})
        if once.exists():
            sys.exit(7)
        once.touch()
        os.kill(os.getpid(), 9)
    """)
    async with Supervisor(tmp_path / "services") as supervisor:
        assert await asyncio.wait_for(supervisor.run_to_end(spec("train", code, tmp_path)), DEADLINE_S) == 7
        assert supervisor.num_restarts == {"train": 1}


async def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    marker = f"# {tmp_path}"
    script = textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from poise.local.process import ProcessSpec
        from poise.local.supervisor import Supervisor

        async def main():
            async with Supervisor(Path({str(tmp_path / "services")!r})) as supervisor:
                command = [sys.executable, "-c", {f"{SLEEPER} {marker} child"!r}]
                await supervisor.start([ProcessSpec("one", command, Path({str(tmp_path / "log")!r}))])
                print("UP", flush=True)
                await asyncio.sleep(600)

        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "UP\n"
        await until(lambda: bool(pids_of(f"{marker} child")))
        process.kill()
    await until(lambda: not pids_of(f"{marker} child"))
