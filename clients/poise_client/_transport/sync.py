"""Base of the blocking clients: each call runs on an event loop in the background, and the caller waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, Unpack

from poise_client._transport import background
from poise_client._transport.client import AsyncClient, ClientOptions
from poise_client._transport.fork import is_forked, reject_after_fork
from poise_client.errors import UnavailableError
from poise_client.types import Group

P = TypeVar("P")
T = TypeVar("T")


class Closable(Protocol):
    """An async object that a `Blocking` can wrap."""

    async def close(self) -> None:
        """Cancel running calls and close every channel."""


A = TypeVar("A", bound=Closable)
C = TypeVar("C", bound=AsyncClient)


class Blocking(Generic[A]):
    """Waits for the calls of an async object. Several threads may use it at once.

    Interrupting a call, for example with Ctrl-C, also cancels it in the service.
    """

    def __init__(self, wrapped: A) -> None:
        self._client = wrapped
        self._lock = threading.Lock()
        self._background: background.BackgroundLoop | None = None
        self._running: set[Future[Any]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return repr(self._client).replace("Async", "", 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel running calls of all threads and close the channel for good. Safe to call twice."""
        if is_forked():  # the parent owns the loop and the channel, and the lock may be held forever
            self._closed = True
            return
        with self._lock:
            self._closed = True
            loop, self._background = self._background, None
            running = tuple(self._running)
        if loop is None:
            return
        for future in running:
            future.cancel()
        try:
            if loop.is_alive():
                loop.submit(self._client.close()).result()
        finally:
            background.shared.release(loop)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine on the background loop; cancel it if the wait is interrupted."""
        try:
            future = self._submit(coroutine)
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result()
        except CancelledError as error:
            if not self._closed:
                raise
            raise UnavailableError("the client was closed during the call", call=repr(self)) from error
        finally:
            future.cancel()
            with self._lock:
                self._running.discard(future)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        reject_after_fork()  # before the lock, which another thread may have held at the fork
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self!r} is closed. Create a new one")
            if self._background is None:
                self._background = background.shared.acquire()
            future = self._background.submit(coroutine)
            self._running.add(future)
            return future


class SyncClient(Blocking[C]):
    """Base of the blocking clients of one service. Takes the arguments of the async client.

    Raises:
        ValueError: invalid target, token or combination of options; a token file that other users can read.
        OSError: a file cannot be read.
        RuntimeError: this process was forked from one that has used gRPC. Every call raises it, too.
    """

    service: ClassVar[str]
    """Name of the gRPC service, for errors."""
    _async_client: type[C]

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(self._async_client(target, **options))

    @property
    def target(self) -> str:
        """Address of the service."""
        return self._client.target


class GroupStream(Iterator[Group]):
    """Yields groups as they complete. Closing or deleting it early cancels the unfinished rollouts in the service.

    Several threads may iterate over one stream: each group goes to one of them.
    """

    def __init__(self, client: Blocking[Any], groups: AsyncGenerator[Group, None]) -> None:
        self._client = client
        self._groups = groups
        self._lock = asyncio.Lock()  # two tasks cannot advance one generator
        self._waiting: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Group:
        if self._closed:
            raise StopIteration
        try:
            group = self._client._run(self._advance())
        except CancelledError:
            if self._closed:
                raise StopIteration from None
            raise
        if group is None:
            raise StopIteration
        return group

    def close(self) -> None:
        """Cancel the stream and end the iteration. Safe to call twice."""
        if not self._closed:
            self._closed = True
            if not self._client._closed and not is_forked():
                self._client._run(self._abort())

    async def _advance(self) -> Group | None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (for the type)
        self._waiting.add(task)
        try:
            async with self._lock:
                return await anext(self._groups, None)
        finally:
            self._waiting.discard(task)

    async def _abort(self) -> None:
        for task in self._waiting:
            task.cancel()
        async with self._lock:
            await self._groups.aclose()


class BlockingPart(Generic[P]):
    """Waits for the calls of an object that belongs to a `Blocking`, such as a run of its services."""

    def __init__(self, owner: Blocking[Any], wrapped: P) -> None:
        self._owner = owner
        self._client = wrapped

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._owner._run(coroutine)
