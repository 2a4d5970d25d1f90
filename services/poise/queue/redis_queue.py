"""The queue on Redis Streams: one consumer group, acknowledged entries deleted, poison beside it.

Owns the keys `<stream>` and `<stream>:dead`. An entry that was acknowledged is deleted, so that the stream's length is
what is unread or owed, and bounds both. Durable as far as the server is: run it with `appendfsync always` (or
accept losing the last second with `everysec`).
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from poise.errors import BackendDown, QueueFull
from poise.queue.interface import (
    MAX_DEAD_LETTER_BYTES,
    DeadLetter,
    Delivery,
    QueueDepth,
    letter_was_cut,
    no_such_letter,
    queue_is_full,
)
from poise.queue.redis_scripts import DEAD_LETTER, HOLDS, NEWEST, PUBLISH, REPLAY
from poise.runtime.addresses import join_address

_PAYLOAD, _REASON, _ENTRY_ID, _IS_WHOLE = b"group", b"reason", b"entry_id", b"is_whole"

_CONNECT_TIMEOUT_S = 2.0
_REPLY_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 1.0


class RedisQueue:
    """One consumer's, or publisher's, handle on the stream. Connects by itself, and again after a loss."""

    def __init__(
        self,
        url: str,
        *,
        stream: str,
        group: str,
        consumer: str,
        max_entries: int,
        max_bytes: int,
        max_dead_letters: int,
        max_dead_letter_bytes: int,
        claim_idle_s: float,
    ) -> None:
        """Prepare; no I/O.

        Args:
            url: `redis://[user:password@]host:port/db`, `rediss://…` or `unix://path`.
            stream: Key of the stream; the dead letters' key is `<stream>:dead`.
            group: The consumer group.
            consumer: This consumer's name, the same after a restart, so that it finds what it still owes.
            max_entries: Most entries unread or owed.
            max_bytes: Most memory that they take in the server.
            max_dead_letters: Most dead letters kept; the oldest go first.
            max_dead_letter_bytes: Most memory that these take; the newest is kept in any case.
            claim_idle_s: After so long without an acknowledgement another consumer's entries are taken over.
        """
        self._redis = redis.asyncio.from_url(
            url,
            protocol=2,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_REPLY_TIMEOUT_S,
            # Once: a pooled connection may be of a server that has restarted since. More is the caller's decision.
            retry=Retry(ConstantBackoff(0.05), 1),
        )
        parts = urlsplit(url)
        self._address = join_address(parts.hostname, parts.port or 6379) if parts.hostname else parts.path
        self._stream, self._dead_stream = stream, f"{stream}:dead"
        self._group, self._consumer = group, consumer
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._max_dead_letters, self._max_dead_letter_bytes = max_dead_letters, max_dead_letter_bytes
        self._claim_idle_s = claim_idle_s
        self._group_exists = False
        self._owed_after: str | None = "0-0"
        self._claim_cursor, self._next_claim_s = "0-0", 0.0

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OutOfMemoryError as error:
            raise QueueFull(
                f"Redis at {self._address} is out of memory: {error}",
                remedy="Wait for the value service to consume, or raise Redis's maxmemory.",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        except (RedisError, OSError) as error:
            self._group_exists = False
            self._owed_after = "0-0"  # an answer may have been lost on the way: ask again for what is owed
            raise BackendDown(
                f"Redis at {self._address} failed: {error or type(error).__name__}",
                remedy="Check that the Redis server runs and that queue.url names it.",
                retry_after_s=_RETRY_AFTER_S,
            ) from error

    async def publish(self, payloads: Sequence[bytes]) -> None:
        """See `LabelQueue.publish`."""
        with self._errors():
            reply = self._redis.eval(PUBLISH, 1, self._stream, self._max_entries, self._max_bytes, *payloads)
            accepted, *held = await cast(Awaitable[list[int]], reply)
        if not accepted:
            raise self._full(held, len(payloads))

    def _full(self, held: Sequence[int], num_more: int) -> QueueFull:
        num_entries, num_bytes = held
        message = queue_is_full(num_entries, num_bytes, self._max_entries, self._max_bytes, num_more)
        return QueueFull(message, retry_after_s=_RETRY_AFTER_S)

    async def read(self, *, max_entries: int, wait_s: float) -> list[Delivery]:
        """See `LabelQueue.read`."""
        with self._errors():
            try:
                await self._ensure_group()
                return await self._read(max_entries, wait_s)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                # The server lost its data, or someone deleted the key: begin anew.
                self._group_exists = False
                return []

    async def _ensure_group(self) -> None:
        if self._group_exists:
            return
        try:
            await self._redis.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._group_exists = True

    async def _read(self, max_entries: int, wait_s: float) -> list[Delivery]:
        while self._owed_after is not None:
            owed = await self._read_group(self._owed_after, max_entries, None)
            self._owed_after = owed[-1][0].decode() if owed else None
            if deliveries := await self._deliveries(owed):
                return deliveries
        if deliveries := await self._claim(max_entries):
            return deliveries
        wait_ms = max(1, round(wait_s * 1000))  # BLOCK 0 would mean for ever
        return await self._deliveries(await self._read_group(">", max_entries, wait_ms))

    async def _read_group(self, after: str, max_entries: int, block_ms: int | None) -> list[Any]:
        reply: Any = await self._redis.xreadgroup(
            self._group, self._consumer, {self._stream: after}, count=max_entries, block=block_ms
        )
        return cast(list[Any], reply[0][1]) if reply else []

    async def _claim(self, max_entries: int) -> list[Delivery]:
        """Take over what other consumers owe for too long. Looks at most twice in that time."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_claim_s:
            return []
        cursor, entries, *_ = await self._redis.xautoclaim(
            self._stream,
            self._group,
            self._consumer,
            min_idle_time=round(self._claim_idle_s * 1000),
            start_id=self._claim_cursor,
            count=max_entries,
        )
        self._claim_cursor = cursor.decode()
        if self._claim_cursor == "0-0":  # the list of owed entries was gone through
            self._next_claim_s = now_s + self._claim_idle_s / 2
        return await self._deliveries(entries)

    async def _deliveries(self, entries: Sequence[Any]) -> list[Delivery]:
        """Drop the owed entries that were deleted under us (a trimmed stream): they cannot be read ever again."""
        gone = [entry_id for entry_id, fields in entries if not fields]
        if gone:
            await self._redis.xack(self._stream, self._group, *gone)
        return [_delivery(entry_id.decode(), fields) for entry_id, fields in entries if fields]

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """See `LabelQueue.ack`."""
        if not entry_ids:
            return
        with self._errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.xack(self._stream, self._group, *entry_ids)
                pipeline.xdel(self._stream, *entry_ids)
                await pipeline.execute()

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """See `LabelQueue.dead_letter`."""
        fields: dict[bytes, Any] = {
            _PAYLOAD: delivery.payload[:MAX_DEAD_LETTER_BYTES],
            _REASON: reason,
            _ENTRY_ID: delivery.entry_id,
            _IS_WHOLE: int(len(delivery.payload) <= MAX_DEAD_LETTER_BYTES),
        }
        limits = self._max_dead_letters, self._max_dead_letter_bytes
        with self._errors():
            reply = self._redis.eval(
                DEAD_LETTER,
                *(2, self._stream, self._dead_stream),
                *(self._group, delivery.entry_id, *limits),
                *itertools.chain.from_iterable(fields.items()),
            )
            await cast(Awaitable[None], reply)

    async def dead_letters(self, *, max_entries: int) -> list[DeadLetter]:
        """See `LabelQueue.dead_letters`."""
        with self._errors():
            entries = await self._redis.xrevrange(self._dead_stream, count=max_entries)
        return [
            DeadLetter(
                letter_id.decode(),
                fields[_ENTRY_ID].decode(),
                fields[_PAYLOAD],
                fields[_REASON].decode(),
                fields[_IS_WHOLE] == b"1",
            )
            for letter_id, fields in cast(list[Any], entries)
        ]

    async def replay(self, letter_ids: Sequence[str]) -> None:
        """See `LabelQueue.replay`."""
        wanted = list(dict.fromkeys(letter_ids))
        _check_letter_ids(wanted)
        with self._errors():
            reply = self._redis.eval(
                REPLAY, 2, self._stream, self._dead_stream, self._max_entries, self._max_bytes, *wanted
            )
            outcome, *detail = await cast(Awaitable[list[Any]], reply)
        if outcome == 0:
            raise self._full(detail, len(wanted))
        if outcome == -1:
            raise no_such_letter(detail[0].decode())
        if outcome == -2:
            raise letter_was_cut(detail[0].decode())

    async def discard(self, letter_ids: Sequence[str]) -> int:
        """See `LabelQueue.discard`."""
        known = [letter_id for letter_id in letter_ids if _is_letter_id(letter_id)]
        if not known:
            return 0
        with self._errors():
            return int(await self._redis.xdel(self._dead_stream, *known))

    async def depth(self) -> QueueDepth:
        """See `LabelQueue.depth`."""
        with self._errors():
            num_entries = await self._redis.xlen(self._stream)
            try:
                dead: dict[str, Any] = await self._redis.xinfo_stream(self._dead_stream)
            except ResponseError as error:
                if "no such key" not in str(error):
                    raise
                dead = {}
        return QueueDepth(num_entries, int(dead.get("entries-added", 0)))

    async def newest(self) -> str | None:
        """See `LabelQueue.newest`."""
        with self._errors():
            found = await cast(Awaitable[bytes | None], self._redis.eval(NEWEST, 1, self._stream))
        return None if found is None else found.decode()

    async def holds(self, entry_id: str) -> bool:
        """See `LabelQueue.holds`."""
        with self._errors():
            return bool(await cast(Awaitable[int], self._redis.eval(HOLDS, 1, self._stream, entry_id)))

    async def close(self) -> None:
        """See `LabelQueue.close`."""
        await self._redis.aclose()


_LETTER_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_ID_END = 2**64


def _is_letter_id(text: str) -> bool:
    return bool(_LETTER_ID.fullmatch(text)) and all(int(part) < _ID_END for part in text.split("-"))


def _check_letter_ids(letter_ids: Sequence[str]) -> None:
    """What is no id of Redis's names no letter: the server would call it an error in the script."""
    for letter_id in letter_ids:
        if not _is_letter_id(letter_id):
            raise no_such_letter(letter_id)


def _delivery(entry_id: str, fields: dict[bytes, bytes]) -> Delivery:
    published_ms = int(entry_id.split("-")[0])  # Redis makes the ids of the time
    return Delivery(entry_id, fields.get(_PAYLOAD, b""), published_ms / 1000)
