"""Parse the requests of a call, with limits on size, number and speed.

gRPC itself would parse before authentication, and report UNKNOWN with only the name of an exception.
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
"""gRPC's default limit, enforced here with a better error."""
MAX_READ_BYTES = 2 * MAX_MESSAGE_BYTES
"""Limit set in gRPC. It is above ours, so that clients see our error; gRPC rejects larger messages itself."""
MAX_MESSAGES = 2**17
"""Maximum messages in a request stream: twice those of the largest push in chunks of 1 MiB."""

WAIT_BUDGET_S = 60.0
"""Maximum seconds to wait for a client. Every `MIN_BYTES_PER_S` bytes received add one second back, up to this."""
MIN_BYTES_PER_S = 2**18

_MAX_UNREAD = 1024
UNREAD_TIMEOUT_S = 1.0


def parse_message(parse: Parse, data: bytes) -> Any:
    """Parse a message. Raises `InvalidRequest` with the message's type or size."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequest.field(
            "request",
            f"has {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}",
            remedy="Send less in one message. If a single group is too large, lower train.rollouts_per_prompt.",
        )
    try:
        return parse(data)
    except DecodeError as error:
        message = getattr(parse, "__self__", None)
        name = message.DESCRIPTOR.full_name if message is not None else "message of this method"
        raise InvalidRequest.field(
            "request", f"is not a {name}: {error}", remedy="Use the protos of this version."
        ) from error


class RequestStream:
    """Iterates over the messages of a request stream. Waiting for a message may be cancelled and repeated.

    A call whose client sends too slowly fails, so that no call occupies a slot or a lock forever. Only the time spent
    waiting for the client counts, not the service's own time between two messages.
    """

    def __init__(self, parse: Parse, requests: AsyncIterator[bytes], budget_s: float = WAIT_BUDGET_S) -> None:
        self._parse = parse
        self._requests = requests
        self._budget_s = self._left_s = budget_s
        self._num_messages = 0

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        """Return the next message. Raises `InvalidRequest` if it is invalid, too late, or one too many."""
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._left_s)):
                data = await anext(self._requests)
        except TimeoutError:
            raise InvalidRequest.field(
                "request",
                f"arrives too slowly: the client fell more than {self._budget_s:g} s behind the minimum rate",
                remedy=f"Send at least {MIN_BYTES_PER_S} bytes per second.",
            ) from None
        finally:
            self._left_s -= time.monotonic() - started_s
        self._left_s = min(self._budget_s, self._left_s + len(data) / MIN_BYTES_PER_S)
        self._num_messages += 1
        if self._num_messages > MAX_MESSAGES:
            raise InvalidRequest.field("request", f"has more than {MAX_MESSAGES} messages. Send larger ones")
        return parse_message(self._parse, data)


async def read_rest(requests: AsyncIterator[Any]) -> None:
    """Read the rest of a rejected stream if it ends soon, so that the client sees our error and not one of gRPC."""
    try:
        for _ in range(_MAX_UNREAD):
            await asyncio.wait_for(anext(requests), UNREAD_TIMEOUT_S)
    except (StopAsyncIteration, TimeoutError, PoiseError):
        return
