"""The supervisor with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from poise.local.processes.process import ProcessSpec, SupervisedProcess, poll_readyz
from poise.local.processes.supervisor import Supervisor, SupervisorError
from poise.runtime.cli.exit_status import WRONG_SETTINGS

DEADLINE_S = 120.0

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


async def test_dead_process_is_restarted_and_all_stop_together(tmp_path: Path) -> None:
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


async def test_process_that_keeps_dying_fails_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.local.processes.supervisor.LAST_BACKOFF_S", 0.01)
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", "import sys; sys.exit('cannot find the moon')", tmp_path)])
        with pytest.raises(SupervisorError) as caught:
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)
    assert "one exited with status 1, 7 times in a row" in str(caught.value)
    assert str(tmp_path / "one.log") in str(caught.value)
    assert "cannot find the moon" in str(caught.value)


async def test_wrong_settings_are_not_retried(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", "import sys; print('port: wrong'); sys.exit(2)", tmp_path)])
        with pytest.raises(SupervisorError, match="port: wrong"):
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)
        assert supervisor.num_restarts == {}


async def test_second_supervisor_is_rejected(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services"):
        with pytest.raises(SupervisorError, match="already running"):
            await Supervisor(tmp_path / "services").__aenter__()


async def test_killed_training_is_restarted_and_its_status_returned(tmp_path: Path) -> None:
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
        assert await asyncio.wait_for(supervisor.run_until_exit(spec("train", code, tmp_path)), DEADLINE_S) == 7
        assert supervisor.num_restarts == {"train": 1}


async def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    marker = f"# {tmp_path}"
    script = textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from poise.local.processes.process import ProcessSpec
        from poise.local.processes.supervisor import Supervisor

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


async def test_training_killed_repeatedly_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.local.processes.supervisor.LAST_BACKOFF_S", 0.01)
    killed = ProcessSpec("train", [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], None)
    async with Supervisor(tmp_path / "services") as supervisor:
        with pytest.raises(SupervisorError, match="train was killed by SIGSEGV, 7 times in a row"):
            await asyncio.wait_for(supervisor.run_until_exit(killed), DEADLINE_S)


async def test_stopped_training_is_not_restarted(tmp_path: Path) -> None:
    marker = f"# {tmp_path}"
    async with Supervisor(tmp_path / "services") as supervisor:
        ending = asyncio.create_task(supervisor.run_until_exit(spec("train", f"{SLEEPER} {marker}", tmp_path)))
        await until(lambda: len(pids_of(marker)) == 1)
        supervisor.end("train")
        assert await asyncio.wait_for(ending, DEADLINE_S) == -signal.SIGTERM
        assert supervisor.num_restarts == {}


async def test_training_stopped_before_its_start_never_starts(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services") as supervisor:
        supervisor.end("train")
        assert await supervisor.run_until_exit(spec("train", "print('ran')", tmp_path)) is None
    assert not (tmp_path / "train.log").exists()


async def test_training_stopped_during_its_start_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SupervisedProcess.start

    async with Supervisor(tmp_path / "services") as supervisor:

        async def start_late(of: ProcessSpec) -> SupervisedProcess:
            supervisor.end("train")
            return await start(of)

        monkeypatch.setattr(SupervisedProcess, "start", start_late)
        ending = supervisor.run_until_exit(spec("train", SLEEPER, tmp_path))
        assert await asyncio.wait_for(ending, DEADLINE_S) == -signal.SIGTERM


async def test_process_that_is_never_ready_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.local.processes.supervisor.LAST_BACKOFF_S", 0.01)
    monkeypatch.setattr("poise.local.processes.supervisor.STEADY_S", 0.0)
    never_works = [sys.executable, "-c", "import sys; sys.exit('out of memory')"]
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([ProcessSpec("one", never_works, tmp_path / "one.log", "127.0.0.1:1")])
        with pytest.raises(SupervisorError, match=r"(?s)7 times in a row.*out of memory"):
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)


async def test_training_ends_when_a_service_fails(tmp_path: Path) -> None:
    marker = f"# {tmp_path}"
    async with Supervisor(tmp_path / "services") as supervisor:
        ending = asyncio.create_task(supervisor.run_until_exit(spec("train", f"{SLEEPER} {marker}", tmp_path)))
        await until(lambda: len(pids_of(marker)) == 1)
        await supervisor.start([spec("one", "import sys; sys.exit(2)", tmp_path)])
        with pytest.raises(SupervisorError, match="one exited with status 2"):
            await asyncio.wait_for(ending, DEADLINE_S)
    assert not pids_of(marker)


async def test_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SupervisorError, match=r"folder cannot be used: .*file"):
        async with Supervisor(tmp_path / "file" / "services"):
            pass


async def test_missing_program_is_named(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services") as supervisor:
        with pytest.raises(SupervisorError, match=r"one cannot be started: .*absent"):
            await supervisor.start([ProcessSpec("one", [str(tmp_path / "absent")], None)])


async def test_program_that_vanished_fails(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{SLEEPER}")
    program.chmod(0o755)
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([ProcessSpec("one", [str(program)], None)])
        program.unlink()
        supervisor.kill_all()
        with pytest.raises(SupervisorError, match="one cannot be started"):
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)


async def test_process_is_restarted_without_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marker = f"# {tmp_path}"
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", f"{SLEEPER} {marker}", tmp_path)])
        (first,) = pids_of(marker)
        shutil.rmtree(tmp_path / "services")
        os.kill(first, signal.SIGKILL)
        await until(lambda: "cannot write process ids" in caplog.text)
        assert pids_of(marker) - {first}
    assert not pids_of(marker)


async def test_error_of_a_watcher_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", SLEEPER, tmp_path)])

        def fail(pid: int) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(psutil, "Process", fail)
        supervisor.kill_all()
        with pytest.raises(SupervisorError, match=r"one cannot be kept running: .*out of luck"):
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)


async def test_orphans_of_a_killed_supervisor_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = f"# {tmp_path}"
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); {SLEEPER} {marker}"
    left = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
    bystander = subprocess.Popen([sys.executable, "-c", f"{SLEEPER} {marker} bystander"], start_new_session=True)
    try:
        assert left.stdout is not None
        assert left.stdout.readline() == b"deaf\n"
        (tmp_path / "services").mkdir()
        born = psutil.Process(left.pid).create_time()
        facts = {"one": [left.pid, born], "reused": [bystander.pid, born - 100], "gone": [2**22 + 1, born]}
        (tmp_path / "services" / "pids.json").write_text(json.dumps(facts))
        monkeypatch.setattr("poise.local.processes.supervisor.STOP_MARGIN_S", 0.5)
        async with Supervisor(tmp_path / "services", 0.5):
            assert await asyncio.to_thread(left.wait, DEADLINE_S) == -signal.SIGKILL
            assert bystander.poll() is None
    finally:
        for process in (left, bystander):
            process.kill()
            process.communicate()


async def test_slow_drain_is_killed_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("poise.local.processes.supervisor.STOP_MARGIN_S", 0.25)
    marker = f"# {tmp_path}"
    deaf = (
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEPER} {marker}"
    )
    async with Supervisor(tmp_path / "services", 0.25) as supervisor:
        await supervisor.start([spec("one", deaf, tmp_path)])
        await until(lambda: "deaf" in (tmp_path / "one.log").read_text())
    assert not pids_of(marker)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"one did not stop within 0 s; killing it (log: {tmp_path / 'one.log'})"]


async def test_drain_within_the_timeout_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("poise.local.processes.supervisor.STOP_MARGIN_S", 0.0)
    drained = tmp_path / "drained"
    drain = f"time.sleep(1); open({str(drained)!r}, 'w'); sys.exit()"
    code = f"import signal, sys, time\ndef drain(*_): {drain}\nsignal.signal(15, drain); print('up', flush=True)"
    async with Supervisor(tmp_path / "services", DEADLINE_S) as supervisor:
        await supervisor.start([spec("one", f"{code}; time.sleep(600)", tmp_path)])
        await until(lambda: "up" in (tmp_path / "one.log").read_text())
    assert drained.exists()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_known_problems_are_logged_while_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("poise.local.processes.supervisor.LOG_EVERY_S", 0.0)
    async with answering(b"HTTP/1.1 503 No\r\n\r\nwaiting for weights", b"HTTP/1.1 200 OK\r\n\r\nready") as address:
        loading = ProcessSpec("one", [sys.executable, "-c", SLEEPER], None, address)
        async with Supervisor(tmp_path / "services") as supervisor:
            await supervisor.start([loading])
            await asyncio.wait_for(supervisor.wait_ready(["one"], lambda: "no room in /dev/shm"), DEADLINE_S)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["waiting for one: waiting for weights; no room in /dev/shm", "one is ready"]


async def test_processes_stop_in_reverse_order(tmp_path: Path) -> None:
    def tells(name: str) -> ProcessSpec:
        end = f"open({str(tmp_path / 'ends')!r}, 'a').write({name!r}) and sys.exit(0)"
        code = (
            f"import signal, sys, time; signal.signal(15, lambda *_: {end}); print('up', flush=True); time.sleep(600)"
        )
        return spec(name, code, tmp_path)

    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([tells("a"), tells("b"), tells("c")])
        await until(lambda: all("up" in (tmp_path / f"{name}.log").read_text() for name in "abc"))
    assert (tmp_path / "ends").read_text() == "cba"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nfine", (True, "fine")),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nloading", (False, "loading")),
        (b"", (False, "does not respond yet")),
        (b"\r\n", (False, "does not respond yet")),
    ],
)
async def test_readiness_is_read_from_any_response(answer: bytes, expected: tuple[bool, str]) -> None:
    async with answering(answer) as address:
        assert await poll_readyz(address) == expected
    assert await poll_readyz(address) == (False, "does not respond yet")


async def test_readiness_poll_has_a_timeout() -> None:
    async with answering(None) as address:
        assert await poll_readyz(address, timeout_s=0.1) == (False, "does not respond yet")


@contextlib.asynccontextmanager
async def answering(*answers: bytes | None) -> AsyncIterator[str]:
    """Serve a request with each of `answers`, or with silence until the caller hangs up; yield the address."""
    left, over = list(answers), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = left.pop(0)
        if answer is None:
            await reader.read()
        else:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()
        await writer.wait_closed()
        if not left:
            over.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.wait_for(over.wait(), DEADLINE_S)


async def test_wrong_settings_end_the_supervisors_program_with_2(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec("one", "import sys; sys.exit(2)", tmp_path)])
        with pytest.raises(SupervisorError, match="its settings are wrong") as caught:
            await asyncio.wait_for(supervisor.failed, DEADLINE_S)
    assert caught.value.status == WRONG_SETTINGS


async def test_process_inherits_no_torchrun_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    async with Supervisor(tmp_path / "services") as supervisor:
        await asyncio.wait_for(
            supervisor.run_until_exit(spec("one", "import os; print(sorted(os.environ))", tmp_path)), DEADLINE_S
        )
    inherited = (tmp_path / "one.log").read_text()
    assert "PATH" in inherited
    assert not any(f"'{name}'" in inherited for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
