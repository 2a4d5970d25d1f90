"""The queue on Redis Streams, with one consumer group and a second stream for dead letters.

The keys are `<stream>` and `{<stream>}:dead`; a cluster keeps both on one node. An acknowledged entry is deleted, so
the stream's length is the number of entries that are not acknowledged, and the limits apply to it. The queue is as
durable as the server: run it with `appendfsync always`. `redis_server` checks the server.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Awaitable, Sequence
from typing import Any, cast

from redis.exceptions import NoPermissionError, ResponseError

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
from poise.queue.loss_detector import Expectation, LossDetector, StreamState
from poise.queue.redis_client import Client, RedisClient, SendCommand
from poise.queue.redis_errors import RETRY_AFTER_S, UnsuitableServerError, to_poise_error
from poise.queue.redis_scripts import (
    ACK,
    DEAD_LETTER,
    EXAMINE,
    HAS_UP_TO,
    MOVE_LETTERS,
    NEWEST,
    PUBLISH,
    REPLAY,
    STATE,
    dead_letter_key,
)

logger = logging.getLogger(__name__)

_PAYLOAD, _REASON, _ENTRY_ID, _IS_WHOLE = b"group", b"reason", b"entry_id", b"is_whole"

_PERMISSIONS = "+@connection +@stream +@scripting +type +exists +memory|usage +info +config|get"


class RedisQueue:
    """One consumer or publisher of the stream. It connects and reconnects automatically."""

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
            stream: Key of the stream.
            group: The consumer group.
            consumer: This consumer's name. Keep it across restarts to get unacknowledged entries again.
            max_entries: Maximum entries that are not acknowledged.
            max_bytes: Maximum memory of these entries in the server.
            max_dead_letters: Maximum dead letters kept. The oldest are dropped first.
            max_dead_letter_bytes: Maximum memory of the dead letters. The newest is always kept.
            claim_idle_s: Claim entries of another consumer that it has not acknowledged for this long.
        """
        self._client = RedisClient(
            url,
            needed_bytes=max_bytes + max_dead_letter_bytes,
            examine_keys=self._examine_keys,
            failed=self._reset,
        )
        self._stream, self._dead_stream = stream, dead_letter_key(stream)
        self._group, self._consumer = group, consumer
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._max_dead_letters, self._max_dead_letter_bytes = max_dead_letters, max_dead_letter_bytes
        self._claim_idle_s = claim_idle_s
        self._group_exists = False
        self._pending_after: str | None = "0-0"
        self._claim_cursor, self._next_claim_s = "0-0", 0.0
        self._losses = LossDetector()
        self._are_letters_moved = False

    def _reset(self) -> None:
        self._group_exists = False
        self._pending_after = "0-0"  # a response may be lost: read the pending entries again

    async def _run(self, script: str, keys: Sequence[str], *arguments: Any) -> Any:
        def work(client: Client) -> Awaitable[Any]:
            return client.eval(script, len(keys), *keys, *arguments)

        return await self._client.call(work)

    async def _examine_keys(self, send: SendCommand, is_cluster: bool) -> None:
        """Check the permissions on the keys, their types, and that no entry is missing."""
        if not is_cluster:  # in a cluster, earlier releases could not write dead letters
            await self._move_letters(send)
        known = self._losses.known
        try:
            arguments = self._stream, self._dead_stream, self._group, self._consumer
            denied, state = await send("EVAL", EXAMINE, 2, *arguments)
        except NoPermissionError as error:
            denied = [str(error).encode()]
        if denied:
            raise UnsuitableServerError(
                f"denies the user of queue.url a required permission: {denied[0].decode()}",
                f"Grant that user {_PERMISSIONS} on the keys ~{self._stream} and ~{self._dead_stream}.",
            )
        self._check(StreamState.parse(state), known)

    async def _move_letters(self, send: SendCommand) -> None:
        """Move dead letters from the key of earlier releases, once. If that fails, they stay there."""
        former = f"{self._stream}:dead"
        if self._are_letters_moved or former == self._dead_stream:
            return
        try:
            if await send("EXISTS", former):
                num_moved = await send("EVAL", MOVE_LETTERS, 2, former, self._dead_stream)
                logger.info("moved %d dead letters from key %s to %s", num_moved, former, self._dead_stream)
        except NoPermissionError:
            pass  # no earlier release can have written there
        except ResponseError as error:
            logger.warning("dead letters in key %s were not moved to %s: %s", former, self._dead_stream, error)
        self._are_letters_moved = True

    def _check(self, state: StreamState, known: Expectation) -> None:
        for key, kind in ((self._stream, state.kind), (self._dead_stream, state.letters_kind)):
            if kind not in ("none", "stream"):
                raise UnsuitableServerError(
                    f"has a {kind} at key {key!r}, not a stream",
                    "Set queue.stream to another name, or delete the key.",
                )
        if self._losses.check(state, known):
            self._reset()

    async def publish(self, payloads: Sequence[bytes]) -> None:
        """See `LabelQueue.publish`."""
        await self._check_publishable()
        limits = self._max_entries, self._max_bytes
        accepted, *detail = await self._run(PUBLISH, [self._stream], *limits, *payloads)
        if not accepted:
            raise self._full(detail, len(payloads))
        self._losses.record_entry(detail[0].decode())

    async def _check_publishable(self) -> None:
        await self._client.call(_no_work)  # refreshes the report
        if self._client.report.publish_error is not None:
            raise to_poise_error(self._client.report.publish_error, self._client.address)

    def _full(self, held: Sequence[int], num_more: int) -> QueueFull:
        num_entries, num_bytes = held
        message = queue_is_full(num_entries, num_bytes, self._max_entries, self._max_bytes, num_more)
        return QueueFull(message, retry_after_s=RETRY_AFTER_S)

    async def read(self, *, max_entries: int, wait_s: float) -> list[Delivery]:
        """See `LabelQueue.read`."""

        async def work(client: Client) -> list[Delivery]:
            try:
                await self._ensure_group(client)
                return await self._read(client, max_entries, wait_s)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                await self._read_state(client)  # the server lost its data or the key was deleted: recreate the group
                self._reset()
                return []

        return await self._client.call(work)

    async def _read_state(self, client: Client) -> StreamState:
        """Return the state of the stream, and record losses since the last one."""
        known = self._losses.known
        reply = client.eval(STATE, 2, self._stream, self._dead_stream, self._group)
        state = StreamState.parse(await cast(Awaitable[list[Any]], reply))
        self._check(state, known)
        return state

    async def _ensure_group(self, client: Client) -> None:
        if self._group_exists:
            return
        try:
            await client.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._group_exists = True
        self._losses.record_group()

    async def _read(self, client: Client, max_entries: int, wait_s: float) -> list[Delivery]:
        while self._pending_after is not None:
            pending = await self._read_group(client, self._pending_after, max_entries, None)
            self._pending_after = pending[-1][0].decode() if pending else None
            if deliveries := await self._deliveries(client, pending):
                return deliveries
        if deliveries := await self._claim(client, max_entries):
            return deliveries
        wait_ms = max(1, round(wait_s * 1000))  # BLOCK 0 would wait forever
        return await self._deliveries(client, await self._read_group(client, ">", max_entries, wait_ms))

    async def _read_group(self, client: Client, after: str, max_entries: int, block_ms: int | None) -> list[Any]:
        reply: Any = await client.xreadgroup(
            self._group, self._consumer, {self._stream: after}, count=max_entries, block=block_ms
        )
        return cast(list[Any], reply[0][1]) if reply else []

    async def _claim(self, client: Client, max_entries: int) -> list[Delivery]:
        """Claim entries that other consumers have not acknowledged for `claim_idle_s`; check twice in that time."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_claim_s:
            return []
        cursor, entries, *_ = await client.xautoclaim(
            self._stream,
            self._group,
            self._consumer,
            min_idle_time=round(self._claim_idle_s * 1000),
            start_id=self._claim_cursor,
            count=max_entries,
        )
        self._claim_cursor = cursor.decode()
        if self._claim_cursor == "0-0":  # all pending entries were checked
            self._next_claim_s = now_s + self._claim_idle_s / 2
        return await self._deliveries(client, entries)

    async def _deliveries(self, client: Client, entries: Sequence[Any]) -> list[Delivery]:
        """Return the entries as deliveries. Acknowledges those without content: XTRIM deleted them."""
        deleted = [entry_id for entry_id, fields in entries if not fields]
        if deleted:
            await client.xack(self._stream, self._group, *deleted)
            self._losses.record_deleted(len(deleted))
        deliveries = [_delivery(entry_id.decode(), fields) for entry_id, fields in entries if fields]
        if deliveries:
            self._losses.record_entry(deliveries[-1].entry_id)
        return deliveries

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """See `LabelQueue.ack`."""
        if entry_ids:
            await self._run(ACK, [self._stream], self._group, *entry_ids)

    async def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """See `LabelQueue.dead_letter`."""
        fields: dict[bytes, Any] = {
            _PAYLOAD: delivery.payload[:MAX_DEAD_LETTER_BYTES],
            _REASON: reason,
            _ENTRY_ID: delivery.entry_id,
            _IS_WHOLE: int(len(delivery.payload) <= MAX_DEAD_LETTER_BYTES),
        }
        limits = self._max_dead_letters, self._max_dead_letter_bytes
        await self._run(
            DEAD_LETTER,
            [self._stream, self._dead_stream],
            *(self._group, delivery.entry_id, *limits),
            *itertools.chain.from_iterable(fields.items()),
        )

    async def dead_letters(self, *, max_entries: int) -> list[DeadLetter]:
        """See `LabelQueue.dead_letters`."""
        entries = await self._client.call(lambda client: client.xrevrange(self._dead_stream, count=max_entries))
        return [_letter(letter_id.decode(), fields) for letter_id, fields in cast(list[Any], entries)]

    async def replay(self, letter_ids: Sequence[str]) -> None:
        """See `LabelQueue.replay`."""
        wanted = list(dict.fromkeys(letter_ids))
        _check_letter_ids(wanted)
        await self._check_publishable()
        limits = self._max_entries, self._max_bytes
        outcome, *detail = await self._run(REPLAY, [self._stream, self._dead_stream], *limits, *wanted)
        if outcome == 0:
            raise self._full(detail, len(wanted))
        if outcome == -1:
            raise no_such_letter(detail[0].decode())
        if outcome == -2:
            raise letter_was_truncated(detail[0].decode())

    async def discard(self, letter_ids: Sequence[str]) -> int:
        """See `LabelQueue.discard`."""
        known = [letter_id for letter_id in letter_ids if _is_letter_id(letter_id)]
        if not known:
            return 0
        return int(await self._client.call(lambda client: client.xdel(self._dead_stream, *known)))

    async def depth(self) -> QueueDepth:
        """See `LabelQueue.depth`."""
        state = await self._client.call(self._read_state)
        report, address = self._client.report, self._client.address
        rejection = report.publish_error
        return QueueDepth(
            num_entries=state.length,
            num_dead_letters=state.num_letters,
            num_losses=self._losses.num_losses,
            last_loss=self._losses.last_loss and f"Redis at {address} lost labels: {self._losses.last_loss}",
            problem="" if rejection is None else f"Redis at {address} {rejection}. {rejection.remedy}",
            warnings=tuple(f"Redis at {address} {warning}" for warning in report.warnings),
        )

    async def newest_unacked(self) -> str | None:
        """See `LabelQueue.newest_unacked`."""
        found: bytes | None = await self._run(NEWEST, [self._stream])
        return None if found is None else found.decode()

    async def has_unacked_up_to(self, entry_id: str) -> bool:
        """See `LabelQueue.has_unacked_up_to`."""
        return bool(await self._run(HAS_UP_TO, [self._stream], entry_id))

    def expect_at_least(self, entry_id: str) -> None:
        """See `LabelQueue.expect_at_least`."""
        self._losses.record_entry(entry_id)

    async def close(self) -> None:
        """See `LabelQueue.close`."""
        await self._client.close()


async def _no_work(_: Client) -> None:
    """Do nothing, so that `RedisClient.call` only checks the connection."""


_LETTER_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_ID_END = 2**64


def _is_letter_id(text: str) -> bool:
    return bool(_LETTER_ID.fullmatch(text)) and all(int(part) < _ID_END for part in text.split("-"))


def _check_letter_ids(letter_ids: Sequence[str]) -> None:
    """Raise `NotFound` for ids that Redis cannot have issued. The script would fail on them."""
    for letter_id in letter_ids:
        if not _is_letter_id(letter_id):
            raise no_such_letter(letter_id)


def _letter(letter_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    """Return a dead letter. Fields may be missing if another program wrote it; then it cannot be replayed."""
    return DeadLetter(
        letter_id,
        fields.get(_ENTRY_ID, b"").decode(errors="replace"),
        fields.get(_PAYLOAD, b""),
        fields.get(_REASON, b"").decode(errors="replace"),
        fields.get(_IS_WHOLE) == b"1" and _PAYLOAD in fields,
    )


def _delivery(entry_id: str, fields: dict[bytes, bytes]) -> Delivery:
    published_ms = int(entry_id.split("-")[0])  # Redis derives ids from the time
    return Delivery(entry_id, fields.get(_PAYLOAD, b""), published_ms / 1000)
