"""Consume, learn, save, acknowledge: each label is learnt exactly once despite crashes at any point."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from tests.support.memory_queue import MemoryQueue, MemoryStream
from tests.unit.value.harness import Harness, until

import poise.value.updater
from poise.errors import BackendDown, QueueFull
from poise.queue.interface import QueueDepth
from poise.value.state import ValueState
from poise.value.updater import Updater

NUM_LABELS = 10


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "READ_WAIT_S", 0.01)
    monkeypatch.setattr(poise.value.updater, "FIRST_RETRY_S", 0.001)


@pytest.fixture
def stream() -> MemoryStream:
    return MemoryStream(max_entries=50)


@pytest.fixture
def start(config, stream) -> Callable[..., Harness]:
    """The warm-up is longer than any test, so that there are no fits."""
    settings = {"queue": {"batch_entries": 4}, "probe": {"warmup_steps": 1000}}
    return lambda **changes: Harness(config(**settings | changes), stream)


async def publish(stream: MemoryStream, *payloads: bytes) -> None:
    await MemoryQueue(stream, "publisher").publish(payloads)


def empty(stream: MemoryStream) -> bool:
    return not stream.unread and not stream.pending


def consumed(harness: Harness) -> Counter[tuple[str, int, str]]:
    """Return the number of copies of each label in the window."""
    return Counter(
        (group.run_id, group.step, group.group_id)
        for domain in harness.state.domains.values()
        for group in domain.window.groups
    )


async def test_labels_are_learnt_saved_and_acknowledged(start, stream, make) -> None:
    await publish(stream, *[make.payload(step) for step in range(NUM_LABELS)])
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
        assert harness.updater.problem == ""
    with start().opened() as after:
        assert consumed(after) == Counter({("run", step, "g0"): 1 for step in range(NUM_LABELS)})


async def test_labels_are_acknowledged_only_after_saving(start, stream, make, monkeypatch) -> None:
    await publish(stream, *[make.payload(step) for step in range(NUM_LABELS)])
    order: list[str] = []

    def noted(owner: type, method: str) -> None:
        real = getattr(owner, method)

        def note(self, *arguments):
            order.append(method)
            return real(self, *arguments)

        monkeypatch.setattr(owner, method, note)

    for owner, method in ((ValueState, "learn"), (Updater, "save"), (MemoryQueue, "ack")):
        noted(owner, method)
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
    expected = [*["learn"] * 4, "save", "ack", *["learn"] * 4, "save", "ack", *["learn"] * 2, "save", "ack"]
    assert order == expected


# Crashes.


class Crash(BaseException):
    """Simulates the end of the process; no later code runs."""


CRASHES: list[tuple[type, str, str]] = [
    (owner, method, when)
    for owner, method in (
        (MemoryQueue, "read"),
        (ValueState, "learn"),
        (Updater, "save"),
        (MemoryQueue, "ack"),
        (MemoryQueue, "dead_letter"),
        (MemoryQueue, "depth"),
    )
    for when in ("before", "after")
]


def crash_once(monkeypatch, owner: type, method: str, when: str, nth: int) -> None:
    real = getattr(owner, method)
    calls = 0

    def is_time() -> bool:
        nonlocal calls
        calls += 1
        return calls == nth

    if asyncio.iscoroutinefunction(real):

        async def crashing(self, *arguments, **options):
            now = is_time()
            if now and when == "before":
                raise Crash
            answer = await real(self, *arguments, **options)
            if now:
                raise Crash
            return answer
    else:

        def crashing(self, *arguments, **options):
            now = is_time()
            if now and when == "before":
                raise Crash
            answer = real(self, *arguments, **options)
            if now:
                raise Crash
            return answer

    monkeypatch.setattr(owner, method, crashing)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(("owner", "method", "when"), CRASHES, ids=lambda value: getattr(value, "__name__", value))
async def test_a_crash_anywhere_learns_each_label_once(
    start, stream, make, monkeypatch, owner, method, when, nth
) -> None:
    poison = {2: b"\xff", 5: b"also poison", 9: b""}
    await publish(stream, *[poison.get(step, make.payload(step)) for step in range(NUM_LABELS + 2)])
    with monkeypatch.context() as patch, start().opened() as harness:
        crash_once(patch, owner, method, when, nth)
        with pytest.raises(Crash):
            await harness.run_until(lambda: False)
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
        good = [step for step in range(NUM_LABELS + 2) if step not in poison]
        assert consumed(harness) == Counter({("run", step, "g0"): 1 for step in good})
        assert harness.state.num_groups_consumed == len(good)
    assert len(stream.dead) == stream.num_dead_letters == len(poison)


async def test_repeated_crashes_still_learn_each_label_once(start, stream, make, monkeypatch) -> None:
    """The service repeatedly starts, makes one more step and dies."""
    await publish(stream, *[make.payload(step) for step in range(NUM_LABELS)])
    num_lives = 0
    for owner, method in ((Updater, "save"), (MemoryQueue, "ack")) * 2:
        with monkeypatch.context() as patch, start(queue={"batch_entries": 2}).opened() as harness:
            crash_once(patch, owner, method, "after", 1)
            with pytest.raises(Crash):
                await harness.run_until(lambda: False)
            num_lives += 1
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
        assert consumed(harness) == Counter({("run", step, "g0"): 1 for step in range(NUM_LABELS)})
        # Lives 1 and 3 died with two labels durable and not acknowledged.
        assert (harness.state.num_groups_consumed, harness.state.num_duplicates) == (NUM_LABELS, 4)


# Temporary failures.


async def test_a_full_disk_keeps_labels_in_the_queue(start, stream, make, monkeypatch) -> None:
    await publish(stream, *[make.payload(step) for step in range(NUM_LABELS)])
    with start().opened() as harness:
        save, failures = harness.store.save, iter(range(3))

        def full(snapshot):
            if next(failures, None) is not None:
                assert len(stream.unread) + len(stream.pending) == NUM_LABELS
                raise OSError(28, "No space left on device")
            return save(snapshot)

        monkeypatch.setattr(harness.store, "save", full)
        problems = set()
        await harness.run_until(lambda: problems.add(harness.updater.problem) or empty(stream))
        assert "the state cannot be saved: [Errno 28] No space left on device" in problems
        assert harness.updater.problem == ""
        assert (harness.state.num_groups_consumed, harness.state.num_duplicates) == (NUM_LABELS, 0)


@pytest.mark.parametrize("method", ["read", "ack", "dead_letter", "depth"])
async def test_a_queue_that_is_down_is_reported_once(start, stream, make, monkeypatch, caplog, method) -> None:
    real, down = getattr(MemoryQueue, method), True

    async def failing(self, *arguments, **options):
        if down:
            raise BackendDown("Redis at somewhere:1 failed")
        return await real(self, *arguments, **options)

    monkeypatch.setattr(MemoryQueue, method, failing)
    await publish(stream, make.payload(0), b"\xff", make.payload(1))
    with caplog.at_level(logging.ERROR), start().opened() as harness:
        running = asyncio.create_task(harness.updater.run())
        await until(lambda: harness.updater.problem == "Redis at somewhere:1 failed")
        await asyncio.sleep(0.05)  # several more turns
        down = False
        await until(lambda: empty(stream) and not harness.updater.problem)
        harness.updater.stop()
        await running
        assert consumed(harness) == Counter({("run", 0, "g0"): 1, ("run", 1, "g0"): 1})
    assert [record.getMessage() for record in caplog.records] == [
        "labels are not consumed: Redis at somewhere:1 failed"
    ]
    assert len(stream.dead) == 1


async def test_an_unreached_queue_is_a_problem(start, stream) -> None:
    with start().opened() as harness:
        assert "not been reached" in harness.updater.problem
        await harness.run_until(lambda: not harness.updater.problem)


# Invalid labels.


async def test_invalid_labels_are_dead_lettered_with_the_reason(start, stream, make, monkeypatch) -> None:
    settings = {"horizon_steps": 1, "probe": {"max_domains": 1, "warmup_steps": 1000}}
    oversized = make.payload(0, "large", width=2000)
    entries = [
        make.payload(7),
        make.payload(7, "second"),
        b"\xff",
        make.payload(7, "wide", width=9),
        make.payload(7, "elsewhere", domain="another"),
        make.payload(6),
        oversized,
        make.payload(7, "last"),
    ]
    await publish(stream, *entries)
    with start(**settings, queue={"max_entry_bytes": 1024}).opened() as harness:
        await harness.run_until(lambda: empty(stream))
        assert consumed(harness) == Counter({("run", 7, name): 1 for name in ("g0", "second", "last")})
    reasons = {letter.payload: letter.reason for letter in stream.dead}
    assert list(reasons) == [*entries[2:6], oversized]
    for payload, part in zip(
        reasons,
        (
            "payload: is not a LabelledGroup message",
            "group.rollouts: hidden states have width 9, but those of domain 'default' have 6",
            "group.domain: 'another' would exceed probe.max_domains = 1",
            "step 6 of run 'run' is older than the deduplication horizon",
            f"payload: is {len(oversized)} bytes; at most 1024 are accepted",
        ),
        strict=True,
    ):
        assert reasons[payload].startswith(part)


async def test_an_unexpected_error_does_not_stop_other_entries(start, stream, make, monkeypatch, caplog) -> None:
    real = poise.value.updater.parse_label

    def defective(payload: bytes, *options):
        if payload == b"cursed":
            raise RuntimeError("a defect")
        return real(payload, *options)

    monkeypatch.setattr(poise.value.updater, "parse_label", defective)
    await publish(stream, b"cursed", make.payload(0))
    with caplog.at_level(logging.ERROR), start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
        assert consumed(harness) == Counter({("run", 0, "g0"): 1})
    assert ["unexpected error" in letter.reason for letter in stream.dead] == [True]
    assert "RuntimeError: a defect" in caplog.text


async def test_a_long_reason_is_truncated(start, stream, make) -> None:
    message = make.message(make.label(0, n=40))
    for rollout in message.rollouts:
        rollout.prompt_hidden.dtype = 0
    await publish(stream, message.SerializeToString())
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
    assert len(stream.dead[0].reason) == 1000


# Duplicates and limits.


async def test_a_group_published_twice_is_learnt_once(start, stream, make) -> None:
    await publish(stream, make.payload(0), make.payload(0), make.payload(0, domain="other"))
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
        assert consumed(harness) == Counter({("run", 0, "g0"): 1})
        assert (harness.state.num_groups_consumed, harness.state.num_duplicates) == (1, 2)


async def test_a_full_queue_rejects_labels_until_some_are_consumed(start, stream, make) -> None:
    await publish(stream, *[make.payload(step) for step in range(50)])
    with pytest.raises(QueueFull) as caught:
        await publish(stream, make.payload(50))
    assert caught.value.retry_after_s
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
        await publish(stream, make.payload(50))


# Pause and stop.


async def test_labels_of_a_pending_read_wait_while_paused(start, stream, make, monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "READ_WAIT_S", 0.3)
    with start().opened() as harness:
        running = asyncio.create_task(harness.updater.run())
        await until(lambda: not harness.updater.problem)
        await until(lambda: not stream.arrived.is_set())  # it waits in a read of the empty queue
        harness.updater.pause()
        await publish(stream, *[make.payload(step) for step in range(3)])
        await until(lambda: harness.updater.depth.num_entries == 3)
        assert harness.updater.paused
        assert consumed(harness) == Counter()
        harness.updater.resume()
        await until(lambda: empty(stream))
        assert sum(consumed(harness).values()) == 3
        harness.updater.stop()
        await running


async def test_while_paused_a_queue_that_is_down_is_a_problem(start, stream, monkeypatch) -> None:
    with start().opened() as harness:
        running = asyncio.create_task(harness.updater.run())
        await until(lambda: not harness.updater.problem)
        harness.updater.pause()
        with monkeypatch.context() as patch:

            async def down(_):
                raise BackendDown("down")

            patch.setattr(MemoryQueue, "depth", down)
            await until(lambda: harness.updater.problem == "down")
        await until(lambda: not harness.updater.problem)
        harness.updater.stop()
        await running


async def test_stopping_while_paused_leaves_the_queue_unchanged(start, stream, make) -> None:
    await publish(stream, make.payload(0))
    with start().opened() as harness:
        harness.updater.pause()
        running = asyncio.create_task(harness.updater.run())
        await until(lambda: harness.updater.depth.num_entries == 1)
        harness.updater.stop()
        await asyncio.wait_for(running, 10)
        assert consumed(harness) == Counter()
    assert len(stream.unread) == 1


async def test_requests_are_answered_between_labels_of_a_batch(start, stream, make, monkeypatch) -> None:
    """A batch takes as long as a refit, so requests must not wait for all of it."""
    await publish(stream, *[make.payload(step) for step in range(4)])
    order: list[str] = []
    learn = ValueState.learn

    def noted(self, label):
        order.append("label")
        return learn(self, label)

    async def queries() -> None:
        while len(order) < 100:
            if order:
                order.append("query")
            await asyncio.sleep(0)

    monkeypatch.setattr(ValueState, "learn", noted)
    asking = asyncio.create_task(queries())
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
    asking.cancel()
    labels = [place for place, event in enumerate(order) if event == "label"]
    assert all("query" in order[one:other] for one, other in pairwise(labels))


async def test_lost_labels_are_logged_and_others_still_learnt(start, stream, make, monkeypatch, caplog) -> None:
    depths = [QueueDepth(0, 0), QueueDepth(0, 0, num_losses=1, last_loss="Redis at r:1 lost labels: it is gone")]

    async def depth() -> QueueDepth:
        return depths[0] if len(depths) == 1 else depths.pop(0)

    with start().opened() as harness:
        monkeypatch.setattr(harness.queue, "depth", depth)
        await publish(stream, make.payload(0))
        await harness.run_until(lambda: empty(stream) and len(depths) == 1 and harness.updater.problem != "")
        assert harness.updater.problem == "Redis at r:1 lost labels: it is gone"
        assert harness.updater.depth.num_losses == 1
        assert consumed(harness)
        assert [record.levelname for record in caplog.records if "lost labels" in record.message] == ["ERROR"]
        monkeypatch.setattr(poise.value.updater, "LOSS_SHOWN_S", 0.0)
        assert harness.updater.problem == ""


async def test_warnings_of_the_queue_are_logged_once(start, stream, monkeypatch, caplog) -> None:
    num_asked = 0

    async def depth() -> QueueDepth:
        nonlocal num_asked
        num_asked += 1
        return QueueDepth(0, 0, problem="it deletes any key", warnings=("it writes nothing to disk",))

    with start().opened() as harness:
        monkeypatch.setattr(harness.queue, "depth", depth)
        await harness.run_until(lambda: num_asked > 3)
        assert harness.updater.problem == "it deletes any key"
    assert sum("nothing to disk" in message for message in caplog.messages) == 1
    assert sum("deletes any key" in message for message in caplog.messages) == 1


async def test_full_dead_letters_do_not_block_other_labels(start, stream, make, monkeypatch) -> None:
    await publish(stream, b"poison", *[make.payload(step) for step in range(NUM_LABELS)])
    with start().opened() as harness:
        real = harness.queue.dead_letter

        async def full(delivery, reason):
            raise QueueFull("Redis is out of memory")

        with monkeypatch.context() as out_of_memory:
            out_of_memory.setattr(harness.queue, "dead_letter", full)
            running = asyncio.create_task(harness.updater.run())
            await until(
                lambda: len(consumed(harness)) == NUM_LABELS and "cannot be dead-lettered" in harness.updater.problem
            )
            assert len(stream.pending) <= 5
        monkeypatch.setattr(harness.queue, "dead_letter", real)
        await until(lambda: empty(stream))
        harness.updater.stop()
        await running
        (letter,) = await harness.queue.dead_letters(max_entries=9)
        assert letter.payload == b"poison"


async def test_the_newest_learnt_entry_survives_a_restart(start, stream, make) -> None:
    await publish(stream, *[make.payload(step) for step in range(12)])  # ids are numbers: 10 comes after 9
    with start().opened() as harness:
        await harness.run_until(lambda: empty(stream))
    with start().opened() as harness:
        assert harness.state.newest_entry == "12-0"
