"""Heartbeats between ranks, so that the loss of one restarts all of them.

Each rank writes a heartbeat to the rendezvous store. Rank 0 watches all others; the others watch rank 0. A rank that
fails, or that is restarted while the others run, writes the reason to the store. A rank that sees a loss exits with
status 1. The supervisor (torchrun, a kubelet) then restarts all of them, and rank 0 resumes from checkpoint and
journal.

Collectives have their own timeouts, see `process_group`.
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
"""Time for an orderly exit after a loss. Then the process is ended: its main thread may hang in a collective."""

_FAILED, _LEAVING = "failed", "leaving"
_LOADING_TIMEOUT_S = 3600.0


class RankLost(BackendDown):
    """Another rank died, hangs, failed or was restarted: all of them must restart."""

    def __init__(self, reason: str, *, in_training: bool = False) -> None:
        super().__init__(reason, remedy="All ranks of the learner restart and resume; retry then.", retry_after_s=1.0)
        self.in_training = in_training
        """Whether the loss is an exception of training on the current batch. Otherwise the batch is not the cause."""


@dataclass(frozen=True, slots=True)
class RankEvents:
    """Callbacks of rank 0. All are called on the health thread."""

    lost: Callable[[RankLost], object]
    """A rank is lost; exit with status 1 within a few seconds."""
    leaving: Callable[[str], object]
    """A rank received a stop signal; finish the current work and end all ranks."""
    giving_up: Callable[[RankLost], object]
    """The orderly exit took too long: the process exits when the callback returns."""


class RankHealth:
    """This rank's heartbeat and its watch over other ranks.

    Args:
        store: the rendezvous store; used by one thread at a time.
        timeout_s: a rank without a heartbeat for this long is lost.
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
        """Announce this rank, start its heartbeat and wait for all other ranks.

        Raises:
            RankLost: the others already run without this rank, or not all join within `timeout_s`.
        """
        with self._lock:
            is_second = self._store.add(f"joined/{self._rank}", 1) > 1
            self._store.set(f"place/{self._rank}", _own_location())
        if is_second:
            reason = f"rank {self._rank} was restarted while the others ran"
            self.fail(reason)
            self._wait_for_group_to_exit()
            raise RankLost(f"{reason}; they exit, and all ranks join again")
        self._thread.start()
        self.wait_for_all("met", timeout_s)
        self._watching.set()

    def _wait_for_group_to_exit(self) -> None:
        """Wait until the running group and its store have exited: otherwise the next start would join it again."""
        deadline = time.monotonic() + self._timeout_s + 2 * _GRACE_S
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                with self._lock:
                    self._store.check([_FAILED])
                time.sleep(0.2)

    def wait_for_all(self, stage: str, timeout_s: float = _LOADING_TIMEOUT_S) -> None:
        """Wait until every rank has reached a stage. Slow ranks may take long while their heartbeat continues.

        Raises:
            RankLost: one was lost meanwhile, or not all reach it within `timeout_s`.
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
                raise RankLost(f"rank {self._rank} was started for a group that has already exited")
            if (loss := self._loss or failure) is not None:
                raise loss
            if time.monotonic() > deadline:
                raise RankLost(f"ranks {_listed(missing)} of {self._size} did not join within {timeout_s:.0f} s")
            time.sleep(0.1)

    def listen(self, events: RankEvents) -> None:
        """Set the callbacks. They are also called for events that have already happened."""
        self._events = events

    def touch(self) -> None:
        """Report that this process's event loop runs. After the first call, a pause of `timeout_s` counts as a loss."""
        self._touched = time.monotonic()

    def fail(self, reason: str, *, in_training: bool = False) -> None:
        """Tell all other ranks to exit, with a reason. Only the first reason is stored."""
        content = json.dumps({"reason": reason, "in_training": in_training})
        with contextlib.suppress(RuntimeError), self._lock:  # without a store they notice on their own
            self._store.compare_set(_FAILED, "", content)

    def leave(self) -> None:
        """Ask rank 0 to finish its work and to end all ranks."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(_LEAVING, f"rank {self._rank} received a stop signal")

    def explain(self, error: Exception) -> Exception:
        """Return the loss that caused an exception of a collective, or the exception itself if all ranks are alive."""
        if self._has_loss.wait(2 * _BEAT_EVERY_S):
            return self._loss or error
        try:
            silent = set(range(self._size)) - {self._rank}
            before = self._beats(silent)
            deadline = time.monotonic() + 5 * _BEAT_EVERY_S
            while silent and time.monotonic() < deadline and not self._has_loss.wait(_BEAT_EVERY_S / 4):
                now = self._beats(silent)
                silent = {rank for rank in silent if now[rank] == before[rank]}
        except RuntimeError as unreachable:
            return RankLost(f"rank 0's host is unreachable: {unreachable}")
        if self._loss is not None:
            return self._loss
        return RankLost(f"ranks {_listed(sorted(silent))} of {self._size} are lost: {error}") if silent else error

    def stop(self) -> None:
        """Stop the heartbeat thread before the process exits: a thread inside the store's code would crash the exit.

        After a loss, that thread no longer uses the store. It only waits to exit the process if nothing else does.
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
            if now - last > self._timeout_s / 2:  # this process was suspended and may have missed heartbeats
                seen = dict.fromkeys(watched, now)
                self._touched = None
            last = now
            if self._touched is not None and now - self._touched > self._timeout_s:
                self._end(
                    self._reported(f"the event loop of rank {self._rank} has been hanging for {self._timeout_s:.0f} s")
                )
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
                loss, leaving = RankLost(f"the rendezvous store on rank 0's host is unreachable: {error}"), False
            if leaving and not self._has_reported_leaving and self._events is not None:
                self._has_reported_leaving = True
                self._events.leaving("a rank of the learner received a stop signal")
            if loss is not None and not self._stopped.is_set():
                self._end(loss)
                return

    def _is_stray(self) -> bool:
        """Return whether torchrun has announced the first host in this store, but not this process's host."""
        host = os.environ.get("GROUP_RANK", "0")
        first, own = (f"torchelastic/role_info/{each}" for each in ("0", host))
        return self._launcher_store.check([first]) and not self._launcher_store.check([own])

    def _beats(self, ranks: Iterable[int]) -> dict[int, bytes]:
        """Return the last heartbeat of each of these ranks; empty before the first."""
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
            self._kill_local(rank)
        return self._reported(f"ranks {_listed(silent)} of {self._size} sent no heartbeat for {self._timeout_s:.0f} s")

    def _reported(self, reason: str) -> RankLost:
        self.fail(reason)
        return RankLost(reason)

    def _kill_local(self, rank: int) -> None:
        """Kill a hanging rank of the same torchrun, because a stopped process would block the restart."""
        with contextlib.suppress(RuntimeError, OSError), self._lock:
            host, parent, pid = bytes(self._store.get(f"place/{rank}")).decode().split()
            if [host, parent] == _own_location().split()[:2] and _parent_of(int(pid)) == os.getppid():
                os.kill(int(pid), signal.SIGKILL)

    def _end(self, loss: RankLost) -> None:
        self._loss = loss
        self._has_loss.set()
        logger.error("%s: rank %d exits, and all ranks restart", loss, self._rank)
        if self._events is not None:
            self._events.lost(loss)
        time.sleep(_GRACE_S)
        if self._events is not None:
            with contextlib.suppress(Exception):
                self._events.giving_up(loss)
        logging.shutdown()
        os._exit(1)


def _own_location() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").readlink().name
    return f"{boot}/{namespace} {os.getppid()} {os.getpid()}"


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:5]))
    return shown if len(ranks) <= 5 else f"{shown} and {len(ranks) - 5} more"
