"""Whether every process of a learner with several is alive, so that the loss of one restarts all of them.

Each process writes a heartbeat to the store through which they met. The first process watches all the others; the
others watch the first. A process that fails, or is started again under a running group, writes the reason to the store.
A process that sees a loss ends itself with status 1. The supervisor (torchrun, a kubelet) then starts all of them
again, and the first resumes from the checkpoint and the journal.

Deliberately not here: collectives. They have time limits of their own, see `world`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

from poise.errors import BackendDown

logger = logging.getLogger(__name__)

_BEAT_EVERY_S = 1.0
_GRACE_S = 5.0
"""Time for an orderly end after a loss. The main thread may be stuck in a collective, so then the process exits."""

_FAILED, _LEAVING = "failed", "leaving"
_LOADING_TIMEOUT_S = 3600.0


class RankLost(BackendDown):
    """Another process of the learner died, hangs, failed or was restarted: all of them must start again."""

    def __init__(self, reason: str, *, in_training: bool = False) -> None:
        super().__init__(reason, remedy="All processes of the learner restart and resume.", retry_after_s=1.0)
        self.in_training = in_training
        """Whether training on the current batch raised an exception there; otherwise the batch is not to blame."""


@dataclass(frozen=True, slots=True)
class RankEvents:
    """Callbacks of the first process. All are called from the health thread."""

    lost: Callable[[RankLost], object]
    """A process is lost; this one is to end with status 1, within a few seconds."""
    leaving: Callable[[str], object]
    """A process was asked to end; this one is to finish its work and end all of them."""
    giving_up: Callable[[RankLost], object]
    """The orderly end did not come: the process exits on return."""


class RankHealth:
    """One process's view of the group.

    Args:
        store: the store through which the processes met; used from one thread at a time.
        timeout_s: a process without a heartbeat for so long is lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        store.set_timeout(timedelta(seconds=timeout_s))
        self._store = distributed_c10d.PrefixStore("poise/health", store)
        self._launcher_store = distributed_c10d.PrefixStore(os.environ.get("TORCHELASTIC_RUN_ID", ""), store)
        self._lock = threading.Lock()
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._stopped = threading.Event()
        self._watching = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-health", daemon=True)
        self._events: RankEvents | None = None
        self._has_reported_leaving = False
        self._touched: float | None = None
        self._loss: RankLost | None = None
        self._has_loss = threading.Event()

    def join(self, timeout_s: float) -> None:
        """Announce this process and wait for all the others; start the heartbeat.

        Raises:
            RankLost: the others run already without this process, or not all come within `timeout_s`.
        """
        with self._lock:
            is_second = self._store.add(f"joined/{self._rank}", 1) > 1
            self._store.set(f"place/{self._rank}", _own_place())
        if is_second:
            reason = f"process {self._rank} was started again while the others ran"
            self.fail(reason)
            self._wait_for_the_end()
            raise RankLost(f"{reason}; they end, and all meet anew")
        self._thread.start()
        self.wait_for_all("met", timeout_s)
        self._watching.set()

    def _wait_for_the_end(self) -> None:
        """Wait until the running group has ended, and its store with it: else the next start would meet it again."""
        deadline = time.monotonic() + self._timeout_s + 2 * _GRACE_S
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                with self._lock:
                    self._store.check([_FAILED])
                time.sleep(0.2)

    def wait_for_all(self, stage: str, timeout_s: float = _LOADING_TIMEOUT_S) -> None:
        """Wait until every process has reached a stage; slow ones may take as long as their heartbeat goes on.

        Raises:
            RankLost: one was lost meanwhile, or not all arrive within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._store.set(f"{stage}/{self._rank}", "1")
        while True:
            with self._lock:
                missing = [rank for rank in range(self._size) if not self._store.check([f"{stage}/{rank}"])]
                failure = self._failure()
                is_stray = bool(missing) and self._is_stray()
            if not missing:
                return
            if is_stray:
                raise RankLost(f"process {self._rank} was started for a group that has ended since")
            if (loss := self._loss or failure) is not None:
                raise loss
            if time.monotonic() > deadline:
                raise RankLost(f"processes {_listed(missing)} of {self._size} did not come within {timeout_s:.0f} s")
            time.sleep(0.1)

    def listen(self, events: RankEvents) -> None:
        """Call these from now on, for all that happens and what has happened."""
        self._events = events

    def touch(self) -> None:
        """Show that this process's event loop runs. Once called, a pause of `timeout_s` counts as a loss."""
        self._touched = time.monotonic()

    def fail(self, reason: str, *, in_training: bool = False) -> None:
        """End all the others, with this process's reason. The first reason counts."""
        content = json.dumps({"reason": reason, "in_training": in_training})
        with contextlib.suppress(RuntimeError), self._lock:  # without a store they notice by themselves
            self._store.compare_set(_FAILED, "", content)

    def leave(self) -> None:
        """Ask the first process to finish its work and to end all."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(_LEAVING, f"process {self._rank} was asked to end")

    def explain(self, error: Exception) -> Exception:
        """Return the loss that an exception of a collective stands for; the exception itself where all are alive."""
        if self._has_loss.wait(2 * _BEAT_EVERY_S):
            return self._loss or error
        try:
            still = set(range(self._size)) - {self._rank}
            before = self._beats(still)
            deadline = time.monotonic() + 5 * _BEAT_EVERY_S
            while still and time.monotonic() < deadline and not self._has_loss.wait(_BEAT_EVERY_S / 4):
                now = self._beats(still)
                still = {rank for rank in still if now[rank] == before[rank]}
        except RuntimeError as unreachable:
            return RankLost(f"the first node is gone: {unreachable}")
        if self._loss is not None:
            return self._loss
        return RankLost(f"processes {_listed(sorted(still))} of {self._size} are gone: {error}") if still else error

    def stop(self) -> None:
        """End the heartbeat before this process ends: at exit, a thread within the store's own code would abort it.

        After a loss, that thread uses the store no more. It only waits to end this process, should nothing else do so.
        """
        self._stopped.set()
        if self._has_loss.is_set() or threading.current_thread() is self._thread:
            return
        if self._thread.is_alive():
            self._thread.join(self._timeout_s + _BEAT_EVERY_S)

    def _run(self) -> None:
        watched = range(1, self._size) if self._rank == 0 else range(1)
        beat, beats = 0, dict.fromkeys(watched, b"")
        seen = dict.fromkeys(watched, time.monotonic())
        last = time.monotonic()
        while not self._stopped.wait(_BEAT_EVERY_S):
            beat += 1
            now = time.monotonic()
            if now - last > self._timeout_s / 2:  # this process stood still: the silence may be its own
                seen = dict.fromkeys(watched, now)
                self._touched = None
            last = now
            if self._touched is not None and now - self._touched > self._timeout_s:
                self._end(self._reported(f"the event loop of process {self._rank} hangs for {self._timeout_s:.0f} s"))
                return
            try:
                with self._lock:
                    self._store.set(f"beat/{self._rank}", str(beat))
                    loss = self._failure()
                    leaving = self._rank == 0 and self._store.check([_LEAVING])
                if self._watching.is_set() and loss is None:
                    current = self._beats(watched)
                    seen |= {rank: time.monotonic() for rank in watched if current[rank] != beats[rank]}
                    beats = current
                    silent = [rank for rank in watched if time.monotonic() - seen[rank] > self._timeout_s]
                    loss = self._lost(silent) if silent else None
                elif not self._watching.is_set():
                    seen = dict.fromkeys(watched, time.monotonic())
            except RuntimeError as error:
                loss, leaving = RankLost(f"the store on the first node is gone: {error}"), False
            if leaving and not self._has_reported_leaving and self._events is not None:
                self._has_reported_leaving = True
                self._events.leaving("a process of the learner was asked to end")
            if loss is not None and not self._stopped.is_set():
                self._end(loss)
                return

    def _is_stray(self) -> bool:
        """Whether torchrun has announced the first host in this store, but not the one of this process."""
        host = os.environ.get("GROUP_RANK", "0")
        first, own = (f"torchelastic/role_info/{each}" for each in ("0", host))
        return self._launcher_store.check([first]) and not self._launcher_store.check([own])

    def _beats(self, ranks: Iterable[int]) -> dict[int, bytes]:
        """Return the last heartbeat of each of these processes; empty before the first."""
        with self._lock:
            keys = {rank: f"beat/{rank}" for rank in ranks}
            return {
                rank: bytes(self._store.get(key)) if self._store.check([key]) else b"" for rank, key in keys.items()
            }

    def _failure(self) -> RankLost | None:
        if not self._store.check([_FAILED]):
            return None
        content = json.loads(self._store.get(_FAILED))
        return RankLost(content["reason"], in_training=content["in_training"])

    def _lost(self, silent: list[int]) -> RankLost:
        for rank in silent:
            self._kill_beside(rank)
        return self._reported(
            f"processes {_listed(silent)} of {self._size} gave no sign of life for {self._timeout_s:.0f} s"
        )

    def _reported(self, reason: str) -> RankLost:
        self.fail(reason)
        return RankLost(reason)

    def _kill_beside(self, rank: int) -> None:
        """Kill a stuck process of the same torchrun: a stopped one would hold up its restart."""
        with contextlib.suppress(RuntimeError, OSError), self._lock:
            host, parent, pid = bytes(self._store.get(f"place/{rank}")).decode().split()
            if [host, parent] == _own_place().split()[:2] and _parent_of(int(pid)) == os.getppid():
                os.kill(int(pid), signal.SIGKILL)

    def _end(self, loss: RankLost) -> None:
        self._loss = loss
        self._has_loss.set()
        logger.error("%s: process %d ends, and all start again", loss, self._rank)
        if self._events is not None:
            self._events.lost(loss)
        time.sleep(_GRACE_S)
        if self._events is not None:
            with contextlib.suppress(Exception):
                self._events.giving_up(loss)
        logging.shutdown()
        os._exit(1)


def _own_place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").readlink().name
    return f"{boot}/{namespace} {os.getppid()} {os.getpid()}"


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:5]))
    return shown if len(ranks) <= 5 else f"{shown} and {len(ranks) - 5} more"
