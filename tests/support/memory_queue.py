"""A `LabelQueue` in memory. It behaves like the Redis queue, except that entries are lost with the process.

`tests/contract/test_label_queue.py` runs one suite on both.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from poise.errors import QueueFull
from poise.queue.interface import (
    MAX_DEAD_LETTER_BYTES,
    DeadLetter,
    Delivery,
    QueueDepth,
    letter_was_truncated,
    no_such_letter,
    queue_is_full,
)


@dataclass
class MemoryStream:
    """The state that several consumers share, in place of the Redis server."""

    max_entries: int = 8192
    max_bytes: int = 512 << 20
    max_dead_letters: int = 1000
    max_dead_letter_bytes: int = 64 << 20
    claim_idle_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    unread: deque[Delivery] = field(default_factory=deque)
    pending: dict[str, _Pending] = field(default_factory=dict)
    dead: deque[DeadLetter] = field(default_factory=deque)
    num_dead_letters: int = 0
    ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Pending:
    """An entry delivered and not yet acknowledged."""

    delivery: Delivery
    consumer: str
    delivered_at_s: float


class MemoryQueue:
    """One consumer or publisher of a `MemoryStream`."""

    def __init__(self, stream: MemoryStream, consumer: str) -> None:
        self._stream = stream
        self._consumer = consumer
        self._pending_checked = False

    async def publish(self, payloads: Sequence[bytes]) -> None:
        """See `LabelQueue.publish`."""
        stream = self._stream
        held = [*stream.unread, *(pending.delivery for pending in stream.pending.values())]
        num_bytes = sum(len(delivery.payload) for delivery in held)
        fits = num_bytes + sum(map(len, payloads)) <= stream.max_bytes
        if len(held) + len(payloads) > stream.max_entries or not fits:
            limits = stream.max_entries, stream.max_bytes
            raise QueueFull(queue_is_full(len(held), num_bytes, *limits, len(payloads)), retry_after_s=1.0)
        for payload in payloads:
            stream.unread.append(Delivery(f"{next(stream.ids)}-0", bytes(payload), time.time()))
        stream.arrived.set()

    async def read(self, *, max_entries: int, wait_s: float) -> list[Delivery]:
        """See `LabelQueue.read`."""
        if pending := self._take_pending(max_entries):
            return pending
        if not self._stream.unread:
            self._stream.arrived.clear()
            try:
                await asyncio.wait_for(self._stream.arrived.wait(), wait_s)
            except TimeoutError:
                return []
        unread = self._stream.unread
        return [self._deliver(unread.popleft()) for _ in range(min(max_entries, len(unread)))]

    def _take_pending(self, max_entries: int) -> list[Delivery]:
        stream = self._stream
        if not self._pending_checked:
            pending = [item for item in stream.pending.values() if item.consumer == self._consumer]
            self._pending_checked = len(pending) <= max_entries
            if pending:
                return [self._deliver(item.delivery) for item in pending[:max_entries]]
        horizon_s = stream.clock() - stream.claim_idle_s
        abandoned = [item for item in stream.pending.values() if item.delivered_at_s <= horizon_s]
        return [self._deliver(item.delivery) for item in abandoned[:max_entries]]

    def _deliver(self, delivery: Delivery) -> Delivery:
        self._stream.pending[delivery.entry_id] = _Pending(delivery, self._consumer, self._stream.clock())
        return delivery

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """See `LabelQueue.ack`."""
        for entry_id in entry_ids:
            self._stream.pending.pop(entry_id, None)

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """See `LabelQueue.dead_letter`."""
        stream = self._stream
        stream.pending.pop(delivery.entry_id, None)
        kept = delivery.payload[:MAX_DEAD_LETTER_BYTES]
        is_whole = len(kept) == len(delivery.payload)
        stream.dead.append(DeadLetter(f"{next(stream.ids)}-0", delivery.entry_id, kept, reason, is_whole))
        stream.num_dead_letters += 1
        while len(stream.dead) > stream.max_dead_letters or self._dead_bytes_exceed():
            stream.dead.popleft()

    def _dead_bytes_exceed(self) -> bool:
        """Whether to drop the oldest letter. The newest is always kept."""
        dead = self._stream.dead
        return len(dead) > 1 and sum(len(letter.payload) for letter in dead) > self._stream.max_dead_letter_bytes

    async def dead_letters(self, *, max_entries: int) -> list[DeadLetter]:
        """See `LabelQueue.dead_letters`."""
        return list(itertools.islice(reversed(self._stream.dead), max_entries))

    async def replay(self, letter_ids: Sequence[str]) -> None:
        """See `LabelQueue.replay`."""
        stream = self._stream
        kept = {letter.letter_id: letter for letter in stream.dead}
        wanted = list(dict.fromkeys(letter_ids))
        for letter_id in wanted:
            if letter_id not in kept:
                raise no_such_letter(letter_id)
            if not kept[letter_id].is_whole:
                raise letter_was_truncated(letter_id)
        await self.publish([kept[letter_id].payload for letter_id in wanted])
        await self.discard(wanted)

    async def discard(self, letter_ids: Sequence[str]) -> int:
        """See `LabelQueue.discard`."""
        stream, unwanted = self._stream, set(letter_ids)
        before = len(stream.dead)
        stream.dead = deque(letter for letter in stream.dead if letter.letter_id not in unwanted)
        return before - len(stream.dead)

    async def depth(self) -> QueueDepth:
        """See `LabelQueue.depth`."""
        stream = self._stream
        return QueueDepth(len(stream.unread) + len(stream.pending), stream.num_dead_letters)

    async def newest_unacked(self) -> str | None:
        """See `LabelQueue.newest_unacked`."""
        return max(self._held(), key=_age, default=None)

    async def has_unacked_up_to(self, entry_id: str) -> bool:
        """See `LabelQueue.has_unacked_up_to`."""
        return any(_age(held) <= _age(entry_id) for held in self._held())

    def _held(self) -> list[str]:
        return [*self._stream.pending, *(delivery.entry_id for delivery in self._stream.unread)]

    def expect_at_least(self, entry_id: str) -> None:
        """Do nothing: no entry outlives the process."""

    async def close(self) -> None:
        """See `LabelQueue.close`."""


def _age(entry_id: str) -> int:
    return int(entry_id.removesuffix("-0"))
