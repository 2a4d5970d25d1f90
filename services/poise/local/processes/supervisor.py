"""Start the processes of a run in order, restart those that die, and stop them in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from poise.local.processes.process import ProcessSpec, SupervisedProcess, describe_exit, kill_group
from poise.local.processes.start_log import StartLog
from poise.runtime.cli.exit_status import FAILED, WRONG_SETTINGS
from poise.runtime.startup import with_elapsed

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.2, 10.0
STEADY_S = 30.0
"""Seconds. A process that was ready and ran for this long is restarted immediately when it dies."""
_MAX_RESTARTS = 6
"""Consecutive restarts before the supervisor fails. A process that was ready and ran for `STEADY_S` resets them."""
STOP_MARGIN_S = 10.0
"""Seconds to stop, in addition to the time for draining."""
_START_TIMEOUT_S = 120.0
"""Seconds until a starting process should respond. It first imports its libraries."""
_NOT_RUNNING = "is not running. Start it with `poise up`"
_POLL_S = 0.1
_READINESS_POLL_S = 1.0
"""Seconds between two polls of a process that is not ready yet."""
LOG_EVERY_S = 15.0


class SupervisorError(Exception):
    """A process cannot be kept running. The message names it and its log."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
        """Exit status for the supervisor's own program."""


class Supervisor:
    """Keeps processes running. An async context manager; its exit stops them, the last started first."""

    def __init__(self, folder: Path, drain_timeout_s: float = 30.0) -> None:
        """Kill processes that do not stop within `drain_timeout_s` plus a margin."""
        self._folder = folder
        self._stop_timeout_s = drain_timeout_s + STOP_MARGIN_S
        self._processes: dict[str, SupervisedProcess] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._lock: IO[bytes] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets a `SupervisorError` when a process cannot be kept running."""
        self.num_restarts: dict[str, int] = {}
        self._ending: set[str] = set()
        """Processes that `end` stopped. They are not restarted."""

    async def __aenter__(self) -> Supervisor:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "supervisor.lock").open("ab")
        except OSError as error:
            raise SupervisorError(f"the services' folder cannot be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise SupervisorError(
                f"the services of {self._folder.parent} are already running. Use `poise train`, or stop them first"
            ) from None
        await asyncio.to_thread(_stop_orphans, self._pids_file, self._stop_timeout_s)
        return self

    async def __aexit__(self, *exception: object) -> None:
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        for process in reversed(self._processes.values()):
            await process.stop(self._stop_timeout_s)
        with contextlib.suppress(OSError):  # all its processes have exited
            self._pids_file.unlink()
        if not self.failed.done():
            self.failed.cancel()
        elif not self.failed.cancelled():
            self.failed.exception()  # marks it as retrieved
        if self._lock is not None:
            self._lock.close()

    async def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Start processes and keep them running."""
        for spec in specs:
            process = await self._start(spec)
            self._watchers[spec.name] = asyncio.create_task(self._keep_running(process), name=f"watch-{spec.name}")

    async def wait_ready(self, names: Sequence[str], problems: Callable[[], str] = str) -> None:
        """Wait until all of `names` are ready.

        `problems` returns further reasons to log, and may block.

        Raises:
            SupervisorError: one cannot be kept running.
        """
        waiting = set(names)
        log = StartLog(LOG_EVERY_S)
        while waiting:
            if self.failed.done():
                self.failed.result()
            states = {name: await self._processes[name].is_ready() for name in sorted(waiting)}
            for name, (ready, _) in states.items():
                if ready:
                    waiting.discard(name)
                    logger.info("%s is ready", name)
            reasons = [f"{name}: {why}" for name, (ready, why) in states.items() if not ready]
            if waiting and log.is_due(reasons):
                if more := await asyncio.to_thread(problems):
                    reasons.append(more)
                logger.info("waiting for %s", "; ".join(reasons))
            await asyncio.sleep(_POLL_S)

    async def run_until_exit(self, spec: ProcessSpec) -> int | None:
        """Run a process until it exits or `end` stops it. Restart it if a signal kills it.

        Returns its last status; None if it never started.

        Raises:
            SupervisorError: it, or another process, cannot be kept running.
        """
        status: int | None = None
        restarts = _Restarts(spec)
        while spec.name not in self._ending:
            process = await self._start(spec)
            if spec.name in self._ending:  # during the start
                self.end(spec.name)
            ended = asyncio.create_task(process.wait())
            try:
                await self.wait_unless_failed(ended)
            finally:
                ended.cancel()
            status = ended.result()
            if status >= 0:
                break
            if spec.name not in self._ending:
                await asyncio.sleep(self._restart_delay(process, restarts, status))
        return status

    async def wait_unless_failed(self, task: asyncio.Task[Any]) -> None:
        """Wait until `task` is done.

        Raises:
            SupervisorError: before that, a process cannot be kept running.
        """
        waited: set[asyncio.Future[Any]] = {task, self.failed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.failed.result()

    def end(self, name: str) -> None:
        """Send a process its stop signal, and never start it again."""
        self._ending.add(name)
        process = self._processes.get(name)
        if process is not None and process.is_running:
            process.process.send_signal(process.spec.stop_signal)

    def kill_all(self) -> None:
        """Kill all processes at once."""
        for process in self._processes.values():
            kill_group(process.pid)

    async def _start(self, spec: ProcessSpec) -> SupervisedProcess:
        try:
            process = self._processes[spec.name] = await SupervisedProcess.start(spec)
        except OSError as error:
            raise SupervisorError(f"{spec.name} cannot be started: {error}") from error
        self._write_pids()
        return process

    async def _keep_running(self, process: SupervisedProcess) -> None:
        restarts = _Restarts(process.spec)
        try:
            while True:
                status = await _wait_for_exit(process)
                await asyncio.sleep(self._restart_delay(process, restarts, status))
                process = await self._start(process.spec)
        except Exception as error:  # otherwise the supervisor would wait forever
            if not isinstance(error, SupervisorError):
                logger.error("%s cannot be kept running", process.spec.name, exc_info=True)
                error = SupervisorError(f"{process.spec.name} cannot be kept running: {error!r}")
            if not self.failed.done():
                self.failed.set_exception(error)

    def _restart_delay(self, process: SupervisedProcess, restarts: _Restarts, status: int) -> float:
        """Log an exit, and return the seconds until the restart. Raises `SupervisorError` if there will be none."""
        pause_s = restarts.add(process, status)
        name, log = process.spec.name, process.spec.log
        self.num_restarts[name] = self.num_restarts.get(name, 0) + 1
        at_log = f" (log: {log})" if log else ""
        logger.warning("%s %s; restarting it%s", name, describe_exit(status), at_log)
        return pause_s

    @property
    def _pids_file(self) -> Path:
        return self._folder / "pids.json"

    def _write_pids(self) -> None:
        facts = {}
        for name, process in self._processes.items():
            if process.is_running:
                try:
                    facts[name] = [process.pid, psutil.Process(process.pid).create_time()]
                except psutil.NoSuchProcess:
                    continue
        temporary = self._pids_file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(facts))
            temporary.replace(self._pids_file)
        except OSError as error:
            logger.warning("cannot write process ids, so a later `poise up` cannot stop these processes: %s", error)


async def _wait_for_exit(process: SupervisedProcess) -> int:
    """Wait for the exit of a process, polling until it is ready; return its status."""
    ended = asyncio.create_task(process.wait())
    try:
        while not ended.done() and not process.was_ready:
            await asyncio.wait({ended}, timeout=_READINESS_POLL_S)
            if not ended.done():
                await process.is_ready()
        return await ended
    finally:
        ended.cancel()


class _Restarts:
    """Counts the consecutive restarts of a process."""

    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec
        self._num = 0

    def add(self, process: SupervisedProcess, status: int) -> float:
        """Count an exit, and return the seconds until the restart.

        Raises:
            SupervisorError: a restart would not help.
        """
        ran_s = time.monotonic() - process.started
        self._num = 1 if process.was_ready and ran_s > STEADY_S else self._num + 1
        log = f". The end of its log, {self._spec.log}:\n{process.log_tail()}" if self._spec.log else ""
        if status == WRONG_SETTINGS:
            why = f"{self._spec.name} {describe_exit(status)}: its settings are wrong"
            raise SupervisorError(f"{why}{log}", WRONG_SETTINGS)
        if self._num > _MAX_RESTARTS:
            raise SupervisorError(f"{self._spec.name} {describe_exit(status)}, {self._num} times in a row{log}")
        return 0.0 if self._num == 1 else min(FIRST_BACKOFF_S * 2**self._num, LAST_BACKOFF_S)


def process_state(folder: Path, name: str, log: Path) -> str:
    """Return the state of a supervised process that does not respond: starting, exited, or never started.

    `folder` is the folder of its supervisor.
    """
    try:
        with (folder / "supervisor.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _NOT_RUNNING
    except BlockingIOError:
        pass  # a supervisor is running
    except OSError:
        return _NOT_RUNNING
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, psutil.NoSuchProcess):
        pid, created = json.loads((folder / "pids.json").read_text())[name]
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            age_s = time.time() - created
            state = "starting" if age_s < _START_TIMEOUT_S else "running, but does not respond"
            return f"{with_elapsed(state, age_s)}; log: {log}"
    return f"exited, and is being restarted; log: {log}"


def _stop_orphans(pids_file: Path, timeout_s: float) -> None:
    """Stop processes that a killed supervisor left running."""
    if not pids_file.exists():
        return
    orphans = []
    for pid, created in json.loads(pids_file.read_text() or "{}").values():
        try:
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1 and process.pid != os.getpid():
                process.terminate()
                orphans.append(process)
        except psutil.NoSuchProcess:
            continue
    if orphans:
        logger.info("stopping %d processes that a killed supervisor left running", len(orphans))
    _, alive = psutil.wait_procs(orphans, timeout=timeout_s)
    if alive:
        logger.warning("%d of them did not stop within %.0f s; killing them", len(alive), timeout_s)
    for pid, _ in json.loads(pids_file.read_text() or "{}").values():
        if any(process.pid == pid for process in orphans):
            kill_group(pid)
    pids_file.unlink(missing_ok=True)
