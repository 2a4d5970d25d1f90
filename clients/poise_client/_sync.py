"""What the blocking clients have in common: waiting for an async client that runs in the background, and its streams.

Each wraps its async client and waits for it; nothing is decided here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from poise_client import _background
from poise_client._channel import TlsOptions
from poise_client._client import AsyncClient
from poise_client._fork import is_forked, refuse_after_fork
from poise_client._retry import RetryPolicy
from poise_client._token import TokenFile
from poise_client.errors import UnavailableError
from poise_client.types import Group

T = TypeVar("T")
C = TypeVar("C", bound=AsyncClient)


class SyncClient(Generic[C]):
    """Base of the blocking clients. May be used by several threads at once.

    An interrupted call (Ctrl-C) is cancelled in the service too. The arguments are those of the async clients.

    Args:
        target: `host:port`, `[IPv6 address]:port`, `dns:///name:port` or `unix:path`.
        token: bearer token; refused over plaintext to another machine unless `allow_insecure_token`.
        token_file: file with the bearer token in place of `token`, read again when it changes; without both, the one
            that the environment names in POISE_TOKEN_FILE.
        tls: how to encrypt; None means plaintext.
        timeout_s: deadline of every call, retries included; None takes each method's own default.
        retries: how retryable errors are retried.
        allow_insecure_token: send the token in the clear, because something else encrypts.
        use_proxy: connect through the proxy that `http_proxy` and the like name; by default they are ignored.

    Raises:
        ValueError: a target, token or combination that cannot be; a token file that other users can read.
        OSError: a file that cannot be read.
        RuntimeError: this process was forked from one that has used gRPC; so does every call.
    """

    service: ClassVar[str]
    """Name of the gRPC service, for errors."""
    _twin: type[C]

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        token_file: Path | str | TokenFile | None = None,
        tls: TlsOptions | None = None,
        timeout_s: float | None = None,
        retries: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
        allow_insecure_token: bool = False,
        use_proxy: bool = False,
    ) -> None:
        self._client = self._twin(
            target,
            token=token,
            token_file=token_file,
            tls=tls,
            timeout_s=timeout_s,
            retries=retries,
            allow_insecure_token=allow_insecure_token,
            use_proxy=use_proxy,
        )
        self._lock = threading.Lock()
        self._background: _background.Background | None = None
        self._running: set[Future[Any]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    @property
    def target(self) -> str:
        """Where the service is."""
        return self._client.target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs in any thread and close the channel. Safe to call twice; a closed client stays closed."""
        if is_forked():  # loop and channel are the parent's, and one of its threads may have held the lock
            self._closed = True
            return
        with self._lock:
            self._closed = True
            background, self._background = self._background, None
            running = tuple(self._running)
        if background is None:
            return
        for future in running:
            future.cancel()
        try:
            if background.is_alive():
                background.submit(self._client.close()).result()
        finally:
            _background.shared.release(background)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine on the background loop; cancel it when the wait is interrupted."""
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
            raise UnavailableError(
                "the client was closed during the call", call=f"{self.service} at {self.target}"
            ) from error
        finally:
            future.cancel()
            with self._lock:
                self._running.discard(future)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        refuse_after_fork()  # before the lock, which another thread may have held at the fork
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self!r} is closed; make a new one")
            if self._background is None:
                self._background = _background.shared.acquire()
            future = self._background.submit(coroutine)
            self._running.add(future)
            return future


class GroupStream(Iterator[Group]):
    """Groups as they finish. Closing it, or dropping it early, cancels what still runs in the service.

    Several threads may iterate over one: each group goes to one of them.
    """

    def __init__(self, client: SyncClient[Any], groups: AsyncGenerator[Group, None]) -> None:
        self._client = client
        self._groups = groups
        self._lock = asyncio.Lock()  # of the loop's tasks; a generator cannot be advanced by two at once
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
        """Cancel the stream; iterating over it ends. Safe to call twice."""
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
