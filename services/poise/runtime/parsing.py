"""Requests from their bytes: parsed within a call, where what cannot be parsed is refused like any wrong request.

gRPC would parse before the call is looked at, and answer UNKNOWN with the name of an exception.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from poise.errors import InvalidRequest

Parse = Callable[[bytes], Any]
"""A generated message's `FromString`."""

MAX_MESSAGE_BYTES = 4 * 2**20
"""gRPC's own limit, refused here in words."""
MAX_READ_BYTES = 8 * MAX_MESSAGE_BYTES
"""What gRPC lets through to be refused; of larger ones it says itself that they are."""


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


class ParsedStream:
    """The messages of a stream of requests, one by one. Waiting for one may be cancelled, and taken up again."""

    def __init__(self, parse: Parse, requests: AsyncIterator[bytes]) -> None:
        self._parse = parse
        self._requests = requests

    def __aiter__(self) -> ParsedStream:
        return self

    async def __anext__(self) -> Any:
        return parsed(self._parse, await anext(self._requests))
