"""The event loop under the blocking clients: one thread, shared by all of them, alive while any of them is in use.

Shared, because gRPC's asyncio layer has one completion queue a process: a loop for each client would gain nothing.
Knows no client.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """A running event loop on a daemon thread of its own."""

    def __init__(self) -> None:
        self.num_leases = 0
        """Clients that use it; guarded by the lock of `Shared`."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(_idle(started)), name="poise_client", daemon=True)
        self._thread.start()
        self._loop, self._stop = started.result()

    def is_alive(self) -> bool:
        """Whether the loop runs. It does not in a child process that was forked from the one that started it."""
        return self._thread.is_alive()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel what runs, close the loop and wait for the thread."""
        if self.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


async def _idle(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    """Tell of the running loop, and keep it running until the event is set; `asyncio.run` cancels what is left."""
    stop = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()


class Shared:
    """Hands out one `Background`: started for the first that asks, stopped by the last that gives it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: Background | None = None

    def acquire(self) -> Background:
        """Return the running loop, to be given back with `release`."""
        with self._lock:
            if self._current is None or not self._current.is_alive():
                self._current = Background()
            self._current.num_leases += 1
            return self._current

    def release(self, background: Background) -> None:
        """Give a loop back, once for each `acquire`."""
        with self._lock:
            background.num_leases -= 1
            if background.num_leases:
                return
            if self._current is background:
                self._current = None
        background.stop()


shared = Shared()
"""The process's own, as gRPC's completion queue is."""
