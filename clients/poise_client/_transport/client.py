"""Base of the async clients: a channel that opens on first use, deadlines, retries and typed errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from poise_client._transport.channel import Dialer, TlsOptions
from poise_client._transport.fork import is_forked, reject_after_fork
from poise_client._transport.retry import Attempts, Clock, RetryPolicy
from poise_client._transport.status import error_from_rpc, renumber
from poise_client._transport.token import TokenFile
from poise_client.codec import CodecError, encode
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
"""Maximum number of prompts or groups in one request."""

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class ClientOptions(TypedDict, total=False):
    """Options of every client, async or blocking."""

    token: str | None
    """Bearer token. It is not sent in plaintext to another machine unless `allow_insecure_token` is set."""
    token_file: Path | str | TokenFile | None
    """File with the bearer token, read again when it changes. Default: the file named by POISE_TOKEN_FILE, if any."""
    tls: TlsOptions | None
    """TLS options; None sends plaintext."""
    timeout_s: float | None
    """Deadline of every call, retries included; None uses the default of each method."""
    retries: RetryPolicy
    """Retry policy for retryable errors."""
    allow_insecure_token: bool
    """Send the token in plaintext, because another layer encrypts the connection."""
    use_proxy: bool
    """Use the proxy of `http_proxy` and similar variables. They are ignored by default."""


class AsyncClient:
    """Base of the async clients. One channel, opened by the first call and bound to its event loop.

    Args:
        target: `host:port`, `[IPv6 address]:port`, `dns:///name:port` or `unix:path`.
        options: see `ClientOptions`.

    Raises:
        ValueError: invalid target, token or combination of options; a token file that other users can read.
        OSError: a file cannot be read.
        RuntimeError: this process was forked from one that has used gRPC. Every call raises it, too.
    """

    service: ClassVar[str]
    """Name of the gRPC service, for errors."""
    _stub: ClassVar[type[Any]]
    """The generated stub of the service."""

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        if unknown := sorted(options.keys() - ClientOptions.__annotations__.keys()):
            raise TypeError(f"unknown option {unknown[0]!r}; use one of {', '.join(ClientOptions.__annotations__)}")
        self._dialer = Dialer(
            target,
            options.get("token"),
            options.get("token_file"),
            options.get("tls"),
            options.get("allow_insecure_token", False),
            options.get("use_proxy", False),
        )
        self._timeout_s = options.get("timeout_s")
        self._retries = options.get("retries", RetryPolicy())
        self._clock = Clock()
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._dialer.target!r})"

    @property
    def target(self) -> str:
        """Address of the service."""
        return self._dialer.target

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel running calls and close the channel for good. Safe to call twice."""
        self._closed = True
        if self._channel is not None:
            channel, self._channel = self._channel, None
            if not is_forked():
                await channel.close(None)

    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError(f"{self!r} is closed. Create a new one")
        reject_after_fork()
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = self._dialer.open(), loop
        elif self._loop is not loop:
            raise RuntimeError(f"{self!r} belongs to the event loop that used it first. Create one client per loop")
        return self._channel

    def _attempts(self, timeout_s: float | None, default_s: float) -> Attempts:
        for limit_s in (timeout_s, self._timeout_s):
            if limit_s is not None:
                if not limit_s > 0:
                    raise InvalidRequestError(
                        "the timeout is too short", violations=[("timeout_s", f"is {limit_s}; required: above 0")]
                    )
                return Attempts(self._retries, limit_s, self._clock)
        return Attempts(self._retries, default_s, self._clock)

    async def _call(
        self,
        method: str,
        attempts: Attempts,
        request: Message | Callable[[], Iterable[Message]],
        decode: Callable[[Any], T],
    ) -> T:
        """Send a request, or a new stream of requests, until it succeeds or `attempts` ends. Decode the answer."""
        while True:
            try:
                with self._translated(method):
                    call = getattr(self._stub(self._open()), method)(
                        request() if callable(request) else request,
                        timeout=attempts.remaining_s(),
                        metadata=self._dialer.metadata,
                    )
                    answer = decode(await call)
                attempts.progressed()
                return answer
            except PoiseClientError as error:
                await attempts.wait_after(error)

    async def _call_in_parts(
        self,
        method: str,
        attempts: Attempts,
        field: str,
        messages: Sequence[Message],
        request: Callable[[list[Any]], Message],
        decode: Callable[[Any, Any], T],
    ) -> list[T]:
        """Send messages in as many requests as necessary, and return the decoded answers.

        Args:
            method: the RPC.
            attempts: attempts of all requests together.
            field: repeated field of the messages. In errors, its indices are those of `messages`.
            messages: messages to send.
            request: returns a request with a part of the messages.
            decode: returns an answer from a request and its response.
        """
        answers: list[T] = []
        for part in pack(messages):
            with encoding("request"):
                sent = request([messages[i] for i in part])
            try:
                answers.append(await self._call(method, attempts, sent, partial(decode, sent)))
            except PoiseClientError as error:
                renumber(error, field, part)
                raise
        return answers

    @contextmanager
    def _translated(self, method: str) -> Iterator[None]:
        """Convert errors of gRPC and of the codec to `PoiseClientError`."""
        call = f"{self.service}.{method} at {self.target}"
        try:
            yield
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error, call)
            if isinstance(failure, UnauthenticatedError) and self._dialer.is_token_new:
                failure.retryable = True  # the service reads the new token within a minute or two
            raise failure from error
        except CodecError as error:
            raise InternalError(f"the answer is malformed: {error}", call=call) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise UnavailableError("the client was closed during the call", call=call) from error


@contextmanager
def encoding(field: str) -> Iterator[None]:
    """Convert errors about values that do not fit a request to `InvalidRequestError`, as the service would."""
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
    """Yield consecutive ranges of indices whose messages fit one request.

    A message above the limit gets its own request, which gRPC may reject.
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


def encode_each(values: Sequence[object], kind: type[M], field: str) -> list[M]:
    """Return dataclasses as messages. Raise `InvalidRequestError`, which names the entry of `field`."""
    messages = []
    for i, value in enumerate(values):
        with encoding(f"{field}[{i}]"):
            messages.append(encode(value, kind, f"{field}[{i}]"))
    return messages
