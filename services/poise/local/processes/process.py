"""One child process in its own process group. It stops when its parent dies."""

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

from poise.local.processes.environment import child_environment
from poise.runtime.network.addresses import split_address
from poise.runtime.startup import with_elapsed

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
NO_RESPONSE = "does not respond yet"
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A command, and how to supervise it."""

    name: str
    command: Sequence[str]
    log: Path | None
    """File for its output; None writes it to the terminal."""
    admin_address: str | None = None
    """host:port of the admin app whose /readyz is polled; None if the process is ready immediately."""
    stop_signal: signal.Signals = signal.SIGTERM
    """Signal that makes it drain and exit."""


class SupervisedProcess:
    """A child process."""

    def __init__(self, spec: ProcessSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.process = process
        self.started = time.monotonic()
        self.was_ready = spec.admin_address is None
        """Whether it has ever been ready."""
        self._has_answered = False

    @classmethod
    async def start(cls, spec: ProcessSpec) -> SupervisedProcess:
        """Start the process. It drains if this process dies."""
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
                env=child_environment(),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        finally:
            if output is not None:
                output.close()
        return cls(spec, process)

    @property
    def pid(self) -> int:
        """Id of the process and of its group."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not exited."""
        return self.process.returncode is None

    async def wait(self) -> int:
        """Wait for the exit and kill the rest of the group; return the status, negative for a signal."""
        status = await self.process.wait()
        kill_group(self.pid)
        return status

    async def stop(self, timeout_s: float) -> None:
        """Send the stop signal, and kill the group after `timeout_s`."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(self.spec.stop_signal)
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                log = f" (log: {self.spec.log})" if self.spec.log else ""
                logger.warning("%s did not stop within %.0f s; killing it%s", self.spec.name, timeout_s, log)
        kill_group(self.pid)
        await self.process.wait()

    async def is_ready(self) -> tuple[bool, str]:
        """Return whether the process is ready, and the reason if not."""
        if self.spec.admin_address is None:
            return True, ""
        ready, reason = await poll_readyz(self.spec.admin_address)
        self.was_ready |= ready
        if not self.is_running:
            assert self.process.returncode is not None  # noqa: S101 (it has exited)
            return False, f"{describe_exit(self.process.returncode)} and is being restarted"
        if reason == NO_RESPONSE and not self._has_answered:
            return False, with_elapsed("starting", time.monotonic() - self.started)
        self._has_answered = True
        return ready, reason

    def log_tail(self, num_lines: int = 15) -> str:
        """Return the last lines of the log."""
        if self.spec.log is None or not self.spec.log.exists():
            return ""
        with self.spec.log.open("rb") as file:
            file.seek(max(0, self.spec.log.stat().st_size - 16384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-num_lines:])


async def poll_readyz(admin_address: str, timeout_s: float = 2.0) -> tuple[bool, str]:
    """Return whether an admin app's /readyz says ready, and the reason if not."""
    host, port = split_address(admin_address)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            with contextlib.closing(writer):
                writer.write(f"GET /readyz HTTP/1.0\r\nHost: {admin_address}\r\n\r\n".encode())
                response = (await reader.read()).decode(errors="replace")
    except (OSError, TimeoutError):
        return False, NO_RESPONSE
    head, _, body = response.partition("\r\n\r\n")
    status = head.split(maxsplit=2)[1:2]  # empty if it closed the connection without a response
    return status == ["200"], body or NO_RESPONSE


def kill_group(pid: int) -> None:
    """Kill all processes of a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def describe_exit(status: int) -> str:
    """Return how a process ended: `exited with status 1`, `was killed by SIGKILL`."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
