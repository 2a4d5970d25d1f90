"""All processes of a run on one machine: started in order, restarted when they die, stopped in order.

Knows processes by their specifications alone.
"""

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

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.2, 10.0
_STEADY_S = 30.0
"""A process that worked and lived this long is restarted at once when it dies."""
_MAX_DEATHS = 6
"""Deaths in a row before giving up, none after it worked and lived `_STEADY_S`."""
_STOP_MARGIN_S = 10.0
"""What ending takes besides draining."""
_STARTS_WITHIN_S = 120.0
"""How long a process may take until its admin app answers: it imports its libraries."""
_NOT_UP = "is not up; start it with `poise up`"
_POLL_S = 0.1
_LOOK_S = 1.0
"""How often one that does not work yet is asked whether it does."""
_SAY_EVERY_S = 15.0


class SupervisorError(Exception):
    """A process cannot be kept running. The message names it, and its log."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
        """What the supervisor's own program exits with."""


class Supervisor:
    """Keeps processes running. Use as an async context manager; leaving it stops them, the last started first."""

    def __init__(self, folder: Path, drain_timeout_s: float = 30.0) -> None:
        """`drain_timeout_s`: how long a process may take to finish its work in hand, at most; later it is killed."""
        self._folder = folder
        self._stop_timeout_s = drain_timeout_s + _STOP_MARGIN_S
        self._processes: dict[str, SupervisedProcess] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._lock: IO[bytes] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises `SupervisorError` once a process cannot be kept running."""
        self.num_restarts: dict[str, int] = {}
        self._ending: set[str] = set()
        """Processes asked to end, which are not started again."""

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
                f"the services of {self._folder.parent} are up already; use them with `poise train`, or stop them first"
            ) from None
        await asyncio.to_thread(_stop_orphans, self._pids_file, self._stop_timeout_s)
        return self

    async def __aexit__(self, *exception: object) -> None:
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        for process in reversed(self._processes.values()):
            await process.stop(self._stop_timeout_s)
        with contextlib.suppress(OSError):  # all that it names are gone
            self._pids_file.unlink()
        if not self.failed.done():
            self.failed.cancel()
        elif not self.failed.cancelled():
            self.failed.exception()  # whoever waited has seen it
        if self._lock is not None:
            self._lock.close()

    async def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Start processes and keep them running."""
        for spec in specs:
            process = await self._start(spec)
            self._keepers[spec.name] = asyncio.create_task(self._keep(process), name=f"keep-{spec.name}")

    async def wait_ready(self, names: Sequence[str], problems: Callable[[], str] = str) -> None:
        """Return when all of `names` say that they work.

        What `problems` returns, and it may block, is said beside what is waited for.

        Raises:
            SupervisorError: one cannot be kept running.
        """
        waiting = set(names)
        log = StartLog(_SAY_EVERY_S)
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
                if told := await asyncio.to_thread(problems):
                    reasons.append(told)
                logger.info("waiting for %s", "; ".join(reasons))
            await asyncio.sleep(_POLL_S)

    async def run_to_end(self, spec: ProcessSpec) -> int | None:
        """Run a process until it exits by itself, starting it again when a signal kills it; return its status.

        Once it was asked to `end`, whatever its status then is; None when it never started.

        Raises:
            SupervisorError: it, or another process, cannot be kept running.
        """
        status: int | None = None
        deaths = _Deaths(spec)
        while spec.name not in self._ending:
            process = await self._start(spec)
            if spec.name in self._ending:  # meanwhile
                self.end(spec.name)
            ended = asyncio.create_task(process.wait())
            try:
                await self.first_of(ended)
            finally:
                ended.cancel()
            status = ended.result()
            if status >= 0:
                break
            if spec.name not in self._ending:
                await asyncio.sleep(self._note_death(process, deaths, status))
        return status

    async def first_of(self, task: asyncio.Task[Any]) -> None:
        """Return when `task` is done.

        Raises:
            SupervisorError: a process cannot be kept running, before that.
        """
        waited: set[asyncio.Future[Any]] = {task, self.failed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.failed.result()

    def end(self, name: str) -> None:
        """Ask a process to drain, and do not start it again, or at all."""
        self._ending.add(name)
        process = self._processes.get(name)
        if process is not None and process.is_running:
            process.process.send_signal(process.spec.stop_signal)

    def kill_all(self) -> None:
        """Kill everything at once."""
        for process in self._processes.values():
            kill_group(process.pid)

    async def _start(self, spec: ProcessSpec) -> SupervisedProcess:
        try:
            process = self._processes[spec.name] = await SupervisedProcess.start(spec)
        except OSError as error:
            raise SupervisorError(f"{spec.name} cannot be started: {error}") from error
        self._write_pids()
        return process

    async def _keep(self, process: SupervisedProcess) -> None:
        deaths = _Deaths(process.spec)
        try:
            while True:
                status = await _whole_life(process)
                await asyncio.sleep(self._note_death(process, deaths, status))
                process = await self._start(process.spec)
        except Exception as error:  # any: else the supervisor would wait for it without end
            if not isinstance(error, SupervisorError):
                logger.error("%s cannot be kept running", process.spec.name, exc_info=True)
                error = SupervisorError(f"{process.spec.name} cannot be kept running: {error!r}")
            if not self.failed.done():
                self.failed.set_exception(error)

    def _note_death(self, process: SupervisedProcess, deaths: _Deaths, status: int) -> float:
        """Return how long to wait before it is started again, s. Raises `SupervisorError` when it is not to be."""
        pause_s = deaths.add(process, status)
        name, log = process.spec.name, process.spec.log
        self.num_restarts[name] = self.num_restarts.get(name, 0) + 1
        at_log = f"; its log: {log}" if log else ""
        logger.warning("%s %s and is started again%s", name, describe_exit(status), at_log)
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
            logger.warning("should this supervisor be killed, the next will not find what it left: %s", error)


async def _whole_life(process: SupervisedProcess) -> int:
    """Return a process's exit status once it is gone; that it works is noted meanwhile."""
    ended = asyncio.create_task(process.wait())
    try:
        while not ended.done() and not process.was_ready:
            await asyncio.wait({ended}, timeout=_LOOK_S)
            if not ended.done():
                await process.is_ready()
        return await ended
    finally:
        ended.cancel()


class _Deaths:
    """How often a process died in a row."""

    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec
        self._num = 0

    def add(self, process: SupervisedProcess, status: int) -> float:
        """Return how long to wait before the next start, s.

        Raises:
            SupervisorError: starting it again would not help.
        """
        lived_s = time.monotonic() - process.started
        self._num = 1 if process.was_ready and lived_s > _STEADY_S else self._num + 1
        log = f"; the end of its log, {self._spec.log}:\n{process.log_tail()}" if self._spec.log else ""
        if status == WRONG_SETTINGS:
            why = f"{self._spec.name} {describe_exit(status)}: it cannot work as it is configured"
            raise SupervisorError(f"{why}{log}", WRONG_SETTINGS)
        if self._num > _MAX_DEATHS:
            raise SupervisorError(f"{self._spec.name} {describe_exit(status)}, {self._num} times in a row{log}")
        return 0.0 if self._num == 1 else min(_FIRST_BACKOFF_S * 2**self._num, _LAST_BACKOFF_S)


def process_state(folder: Path, name: str, log: Path) -> str:
    """Return what a supervised process does that does not answer: whether it starts, died, or was never started.

    `folder` is that of its supervisor.
    """
    try:
        with (folder / "supervisor.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _NOT_UP
    except BlockingIOError:
        pass  # held by a supervisor that runs
    except OSError:
        return _NOT_UP
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, psutil.NoSuchProcess):
        pid, created = json.loads((folder / "pids.json").read_text())[name]
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            age_s = time.time() - created
            state = "starting" if age_s < _STARTS_WITHIN_S else "runs, and does not answer"
            return f"{with_elapsed(state, age_s)}; its log: {log}"
    return f"died, and is started again; its log: {log}"


def _stop_orphans(pids_file: Path, timeout_s: float) -> None:
    """End what a supervisor that was killed left running."""
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
        logger.info("ending %d processes that an earlier supervisor left behind", len(orphans))
    _, deaf = psutil.wait_procs(orphans, timeout=timeout_s)
    if deaf:
        logger.warning("%d of them did not end within %.0f s and are killed", len(deaf), timeout_s)
    for pid, _ in json.loads(pids_file.read_text() or "{}").values():
        if any(process.pid == pid for process in orphans):
            kill_group(pid)
    pids_file.unlink(missing_ok=True)
