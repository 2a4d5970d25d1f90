"""The event loop of the blocking clients: one thread, shared by all clients, alive while at least one is in use.

It is shared because gRPC's asyncio layer has one completion queue per process: more loops would gain nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """A running event loop on its own daemon thread."""

    def __init__(self) -> None:
        self.num_leases = 0
        """Number of clients that use the loop. Guarded by the lock of `SharedLoop`."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(_serve(started)), name="poise_client", daemon=True)
        self._thread.start()
        self._loop, self._stop = started.result()

    def is_alive(self) -> bool:
        """Return whether the loop runs. It does not run in forked children."""
        return self._thread.is_alive()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel running coroutines, close the loop and join the thread."""
        if self.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


async def _serve(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    """Publish the running loop and keep it running until the event is set."""
    stop = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()


class SharedLoop:
    """Lends one `BackgroundLoop`. The first `acquire` starts it, and the last `release` stops it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: BackgroundLoop | None = None

    def acquire(self) -> BackgroundLoop:
        """Return the running loop. Pass it to `release` afterwards."""
        with self._lock:
            if self._current is None or not self._current.is_alive():
                self._current = BackgroundLoop()
            self._current.num_leases += 1
            return self._current

    def release(self, background: BackgroundLoop) -> None:
        """Return a loop, once for each `acquire`."""
        with self._lock:
            background.num_leases -= 1
            if background.num_leases:
                return
            if self._current is background:
                self._current = None
        background.stop()


shared = SharedLoop()
"""The loop of this process, which also has one gRPC completion queue."""
