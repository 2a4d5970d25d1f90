"""Requests from their bytes, parsed within a call: limits of size, number and pace, and errors that say what is wrong.

gRPC would parse before the call is looked at, and answer UNKNOWN with the name of an exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from poise.errors import InvalidRequest, PoiseError

Parse = Callable[[bytes], Any]
"""A generated message's `FromString`."""

MAX_MESSAGE_BYTES = 4 * 2**20
"""gRPC's own limit, refused here in words."""
MAX_READ_BYTES = 2 * MAX_MESSAGE_BYTES
"""Limit of gRPC, above ours so that our error is the one that clients see; gRPC itself rejects larger ones."""
MAX_MESSAGES = 2**17
"""Messages in a stream of requests: twice as many as the largest push has in chunks of 1 MiB."""

PATIENCE_S = 60.0
"""Budget of waiting for the client of a call. Waiting spends it; received bytes restore it at `MIN_BYTES_PER_S`."""
MIN_BYTES_PER_S = 2**18

_MAX_UNREAD = 1024
_UNREAD_PATIENCE_S = 1.0


def parsed(parse: Parse, data: bytes) -> Any:
    """Return the message that `data` holds. Raises `InvalidRequest`, which names the message's type, or its size."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequest.field(
            "request",
            f"has {len(data)} bytes; a message may have {MAX_MESSAGE_BYTES}",
            remedy="Send less in one message. Where a single group is too large, lower the rollouts of a prompt "
            "(train.rollouts_per_prompt).",
        )
    try:
        return parse(data)
    except DecodeError as error:
        message = getattr(parse, "__self__", None)
        name = message.DESCRIPTOR.full_name if message is not None else "message of this method"
        raise InvalidRequest.field(
            "request", f"is no {name}: {error}", remedy="Send protobuf, made from the protos of this version."
        ) from error


class RequestStream:
    """The messages of a stream of requests, one by one. A wait for one may be cancelled and repeated.

    A call whose client sends too slowly fails, so that no call holds its slot, or a lock, without end. Only the time
    spent waiting for the client counts, not the time that the service takes between two messages.
    """

    def __init__(self, parse: Parse, requests: AsyncIterator[bytes], patience_s: float = PATIENCE_S) -> None:
        self._parse = parse
        self._requests = requests
        self._patience_s = self._left_s = patience_s
        self._num_messages = 0

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        """Return the next message. Raises `InvalidRequest` for one that is wrong, too many, or too late."""
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._left_s)):
                data = await anext(self._requests)
        except TimeoutError:
            raise InvalidRequest.field(
                "request",
                f"arrives too slowly: the service waited {self._patience_s:g} s for too few bytes and ended the call",
                remedy=f"Send at least {MIN_BYTES_PER_S} bytes a second, or end the call.",
            ) from None
        finally:
            self._left_s -= time.monotonic() - started_s
        self._left_s = min(self._patience_s, self._left_s + len(data) / MIN_BYTES_PER_S)
        self._num_messages += 1
        if self._num_messages > MAX_MESSAGES:
            raise InvalidRequest.field("request", f"has more than {MAX_MESSAGES} messages; send larger ones")
        return parsed(self._parse, data)


async def read_rest(requests: AsyncIterator[Any]) -> None:
    """Let a client whose stream is refused finish, if it soon will: else it may see an error of gRPC's own."""
    try:
        for _ in range(_MAX_UNREAD):
            await asyncio.wait_for(anext(requests), _UNREAD_PATIENCE_S)
    except (StopAsyncIteration, TimeoutError, PoiseError):
        return
