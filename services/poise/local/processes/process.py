"""One supervised process: started in a group of its own, gone with its parent, restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.local.processes.environment import inherited
from poise.runtime.network.addresses import split_address
from poise.runtime.startup import with_elapsed

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
NO_ANSWER = "does not answer yet"
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run."""

    name: str
    command: Sequence[str]
    log: Path | None
    """Where its output goes; None leaves it on the terminal."""
    admin_address: str | None = None
    """host:port whose /readyz says when it works; None means at once."""
    stop_signal: signal.Signals = signal.SIGTERM
    """Asks it to drain."""


class SupervisedProcess:
    """A running child, by its specification."""

    def __init__(self, spec: ProcessSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.process = process
        self.started = time.monotonic()
        self.was_ready = spec.admin_address is None
        """Whether it ever said that it works."""
        self._has_answered = False

    @classmethod
    async def start(cls, spec: ProcessSpec) -> SupervisedProcess:
        """Start it. It is asked to drain should this process die."""
        output = None
        if spec.log is not None:
            spec.log.parent.mkdir(parents=True, exist_ok=True)
            output = spec.log.open("ab")
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=inherited(),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        finally:
            if output is not None:
                output.close()
        return cls(spec, process)

    @property
    def pid(self) -> int:
        """Its process id, which is its group's too."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not exited."""
        return self.process.returncode is None

    async def wait(self) -> int:
        """Return its exit status once it is gone, negative for a signal; nothing of its group is left then."""
        status = await self.process.wait()
        kill_group(self.pid)
        return status

    async def stop(self, timeout_s: float) -> None:
        """Ask it to drain, and kill its group after `timeout_s`."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(self.spec.stop_signal)
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                at_log = f"; its log: {self.spec.log}" if self.spec.log else ""
                logger.warning("%s did not end within %.0f s and is killed%s", self.spec.name, timeout_s, at_log)
        kill_group(self.pid)
        await self.process.wait()

    async def is_ready(self) -> tuple[bool, str]:
        """Whether it says that it works, and else why not."""
        if self.spec.admin_address is None:
            return True, ""
        ready, reason = await ask_ready(self.spec.admin_address)
        self.was_ready |= ready
        if not self.is_running:
            assert self.process.returncode is not None  # noqa: S101 (it has exited)
            return False, f"{describe_exit(self.process.returncode)} and is started again"
        if reason == NO_ANSWER and not self._has_answered:
            return False, with_elapsed("starting", time.monotonic() - self.started)
        self._has_answered = True
        return ready, reason

    def log_tail(self, num_lines: int = 15) -> str:
        """Return the last lines of its log."""
        if self.spec.log is None or not self.spec.log.exists():
            return ""
        with self.spec.log.open("rb") as file:
            file.seek(max(0, self.spec.log.stat().st_size - 16384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-num_lines:])


async def ask_ready(admin_address: str, timeout_s: float = 2.0) -> tuple[bool, str]:
    """Ask an admin app's /readyz."""
    host, port = split_address(admin_address)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            with contextlib.closing(writer):
                writer.write(f"GET /readyz HTTP/1.0\r\nHost: {admin_address}\r\n\r\n".encode())
                answer = (await reader.read()).decode(errors="replace")
    except (OSError, TimeoutError):
        return False, NO_ANSWER
    head, _, body = answer.partition("\r\n\r\n")
    status = head.split(maxsplit=2)[1:2]  # empty where it hung up without a word
    return status == ["200"], body or NO_ANSWER


def kill_group(pid: int) -> None:
    """Kill what is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def describe_exit(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
