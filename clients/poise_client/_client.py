"""What the three async clients share: one lazily opened channel, deadlines, retries, typed errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TypeVar

import grpc
from google.protobuf.message import Message

from poise_client._channel import Dialer, TlsOptions
from poise_client._fork import is_forked, refuse_after_fork
from poise_client._retry import Attempts, Clock, RetryPolicy
from poise_client._status import error_from_rpc
from poise_client._token import TokenFile
from poise_client.codec import CodecError
from poise_client.errors import (
    InternalError,
    InvalidRequestError,
    PoiseClientError,
    UnauthenticatedError,
    UnavailableError,
)

MAX_REQUEST_BYTES = 3 * 2**20
"""Requests are split below this, well under gRPC's default limit of 4 MiB."""

MAX_ENTRIES = 4096
"""Most prompts or groups in one request."""

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class AsyncClient:
    """Base of the async clients. One channel, opened at the first call and bound to that event loop.

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
        self._dialer = Dialer(target, token, token_file, tls, allow_insecure_token, use_proxy)
        self._timeout_s = timeout_s
        self._retries = retries
        self._clock = Clock()
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._dialer.target!r})"

    @property
    def target(self) -> str:
        """Where the service is."""
        return self._dialer.target

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and close the channel. Safe to call twice; a closed client stays closed."""
        self._closed = True
        if self._channel is not None:
            channel, self._channel = self._channel, None
            if not is_forked():
                await channel.close(None)

    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError(f"{self!r} is closed; make a new one")
        refuse_after_fork()
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = self._dialer.open(), loop
        elif self._loop is not loop:
            raise RuntimeError(f"{self!r} belongs to the event loop that used it first; make one client per loop")
        return self._channel

    def _attempts(self, timeout_s: float | None, default_s: float) -> Attempts:
        for given_s in (timeout_s, self._timeout_s):
            if given_s is not None:
                if not given_s > 0:
                    raise InvalidRequestError(
                        "cannot finish in no time", violations=[("timeout_s", f"is {given_s}; required: above 0")]
                    )
                return Attempts(self._retries, given_s, self._clock)
        return Attempts(self._retries, default_s, self._clock)

    async def _call(
        self,
        method: str,
        attempts: Attempts,
        start: Callable[[float], Awaitable[M]],
        decode: Callable[[M], T],
    ) -> T:
        """Start an RPC, with the seconds it has, until it succeeds or `attempts` has enough; decode the answer."""
        while True:
            try:
                with self._translated(method):
                    answer = decode(await start(attempts.remaining_s()))
                attempts.progressed()
                return answer
            except PoiseClientError as error:
                await attempts.wait_after(error)

    @contextmanager
    def _translated(self, method: str) -> Iterator[None]:
        """Turn what gRPC and the codec raise about an RPC into the family of `errors`."""
        call = f"{self.service}.{method} at {self.target}"
        try:
            yield
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error, call)
            if isinstance(failure, UnauthenticatedError) and self._dialer.is_token_new:
                failure.retryable = True  # the service reads the new token within a minute or two
            raise failure from error
        except CodecError as error:
            raise InternalError(f"the answer makes no sense: {error}", call=call) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise UnavailableError("the client was closed during the call", call=call) from error


@contextmanager
def encoding(field: str) -> Iterator[None]:
    """Turn what cannot be packed into a request into the error that the service would have answered."""
    try:
        yield
    except CodecError as error:
        raise InvalidRequestError("cannot be sent", violations=[(error.field, error.description)]) from error
    except (
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
        KeyError,
    ) as error:  # protobuf and numpy on wrong types
        raise InvalidRequestError("cannot be sent", violations=[(field, str(error))]) from error


def pack(messages: Sequence[M]) -> Iterator[range]:
    """Split messages into consecutive runs that fit a request each, as ranges of indices.

    A message that is too large by itself gets a request of its own: its fate is gRPC's to decide.
    """
    start, size = 0, 0
    for i, message in enumerate(messages):
        cost = message.ByteSize() + 8  # its tag and length
        if i > start and (size + cost > MAX_REQUEST_BYTES or i - start == MAX_ENTRIES):
            yield range(start, i)
            start, size = i, 0
        size += cost
    if messages:
        yield range(start, len(messages))
