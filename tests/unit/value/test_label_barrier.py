"""Waiting until probes know every label published before: what it waits for, what ends it, what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

import pytest
from tests.unit.value.parts import TIMEOUT_S, FailingFitter, HeldFitter, MeanFitter, Parts, until

import poise.value.consumer
from poise.errors import BackendDown
from poise.queue.memory_queue import MemoryQueue, MemoryStream


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(poise.value.consumer, "_READ_WAIT_S", 0.01)
    monkeypatch.setattr(poise.value.consumer, "_FIRST_RETRY_S", 0.001)


@pytest.fixture
def stream() -> MemoryStream:
    return MemoryStream()


@pytest.fixture
def start(config, stream) -> Callable[..., Parts]:
    return lambda make_fitter=MeanFitter, **changes: Parts(config(**changes), stream, make_fitter)


@contextlib.asynccontextmanager
async def at_work(parts: Parts, *, consuming: bool = True, fitting: bool = True) -> AsyncIterator[None]:
    """Let the service's loops run beside the block."""
    loops = [asyncio.create_task(parts.consumer.run())] if consuming else []
    loops += [asyncio.create_task(parts.refitter.run())] if fitting else []
    with parts.alive():
        try:
            yield
        finally:
            parts.consumer.stop()
            parts.refitter.stop()
            await asyncio.wait_for(asyncio.gather(*loops), TIMEOUT_S)


def settle(parts: Parts, *asked: str, limit_s: float = TIMEOUT_S) -> asyncio.Task[frozenset[str] | None]:
    """What a question of a run of its own waits for: about the default domain, if none is named."""
    return asyncio.create_task(parts.settling.settle("asks", asked or ("default",), limit_s))


SETTLED: frozenset[str] = frozenset()
UNKNOWN = None


async def given_a_chance() -> None:
    """Let every task go as far as it gets by itself."""
    for _ in range(50):
        await asyncio.sleep(0)


async def publish(stream: MemoryStream, make, *steps: int) -> None:
    await MemoryQueue(stream, "publisher").publish([make.payload(step) for step in steps])


async def test_it_ends_when_the_labels_are_learnt_and_the_probe_is_fitted_on_all_of_them(start, stream, make) -> None:
    parts = start(queue={"batch_entries": 2})
    await publish(stream, make, *range(7))
    settling = settle(parts)
    await given_a_chance()
    assert not settling.done()
    async with at_work(parts):
        assert await settling == SETTLED
        assert parts.estimator.probes["default"].num_added == 7
        assert not stream.unread
        assert not stream.pending


async def test_labels_that_are_read_and_not_durable_are_waited_for(start, stream, make, monkeypatch) -> None:
    parts = start()
    save, begun, go = parts.store.save, threading.Event(), threading.Event()

    def held(snapshot):
        begun.set()
        assert go.wait(TIMEOUT_S)
        return save(snapshot)

    monkeypatch.setattr(parts.store, "save", held)
    await publish(stream, make, 0)
    async with at_work(parts):
        settling = settle(parts)
        await until(begun.is_set)
        await given_a_chance()
        assert parts.estimator.num_groups_consumed == 1
        assert not settling.done()
        go.set()
        assert await settling == SETTLED


async def test_a_fit_in_hand_is_waited_for_and_so_is_the_one_that_it_leaves_due(start, stream, make) -> None:
    fitter = HeldFitter()
    parts = start(lambda: fitter)
    async with at_work(parts):
        await publish(stream, make, 0, 1)
        await until(lambda: fitter.num_begun == 1)
        await publish(stream, make, 2)
        await until(lambda: not stream.unread and not stream.pending)
        settling = settle(parts)
        fitter.go.release()
        await until(lambda: fitter.num_begun == 2)
        await given_a_chance()
        assert not settling.done()
        fitter.go.release()
        assert await settling == SETTLED
        assert parts.estimator.probes["default"].num_added == 3


async def test_the_end_of_a_fit_ends_it_whatever_else_goes_on(start, make) -> None:
    parts = start()
    for step in range(2):
        parts.estimator.learn(make.label(step))
    async with at_work(parts, consuming=False):
        assert await asyncio.wait_for(settle(parts), TIMEOUT_S / 2) == SETTLED


async def test_what_is_published_and_learnt_meanwhile_is_not_waited_for(start, stream, make) -> None:
    fitter = HeldFitter()
    parts = start(lambda: fitter, queue={"batch_entries": 1})
    await publish(stream, make, 0, 1)
    async with at_work(parts):
        settling = settle(parts)
        await until(lambda: fitter.num_begun == 1)
        await publish(stream, make, 2)
        await until(lambda: not stream.unread and not stream.pending)
        fitter.go.release()
        assert await asyncio.wait_for(settling, TIMEOUT_S / 2) == SETTLED  # although another fit is held
        fitter.go.release()


async def test_an_entry_published_meanwhile_is_not_waited_for_either(start, stream, make, monkeypatch) -> None:
    parts = start(queue={"batch_entries": 1}, probe={"warmup_steps": 9})
    save, num_saves, go = parts.store.save, iter(range(9)), threading.Event()

    def all_but_the_first_held(snapshot):
        assert next(num_saves) == 0 or go.wait(TIMEOUT_S)
        return save(snapshot)

    monkeypatch.setattr(parts.store, "save", all_but_the_first_held)
    await publish(stream, make, 0)
    settling = settle(parts)
    await given_a_chance()
    await publish(stream, make, 1)
    async with at_work(parts):
        assert await asyncio.wait_for(settling, TIMEOUT_S / 2) == SETTLED
        assert stream.unread or stream.pending
        go.set()


async def test_nothing_to_learn_is_settled_at_once_even_while_paused(start, stream) -> None:
    parts = start()
    parts.consumer.pause()
    async with at_work(parts):
        assert await settle(parts) == SETTLED


async def test_a_domain_in_its_warm_up_is_settled_without_a_probe(start, stream, make) -> None:
    parts = start(probe={"warmup_steps": 3})
    await publish(stream, make, 0, 1)
    async with at_work(parts):
        assert await settle(parts) == SETTLED
        assert not parts.estimator.probes


async def test_the_limit_ends_it(start, stream, make) -> None:
    parts = start()
    await publish(stream, make, 0)
    async with at_work(parts, consuming=False):
        assert await settle(parts, limit_s=0.01) is UNKNOWN


@pytest.mark.parametrize("halt", ["pause", "stop"])
async def test_it_ends_at_once_when_consuming_is_halted(start, stream, make, halt) -> None:
    parts = start()
    await publish(stream, make, 0)
    async with at_work(parts, consuming=False):
        waiting = settle(parts)
        await given_a_chance()
        assert not waiting.done()
        getattr(parts.consumer, halt)()
        assert await asyncio.wait_for(waiting, TIMEOUT_S / 2) is UNKNOWN
        assert await asyncio.wait_for(settle(parts), TIMEOUT_S / 2) is UNKNOWN


async def test_it_ends_at_once_when_fitting_stops(start, make) -> None:
    parts = start()
    for step in range(2):
        parts.estimator.learn(make.label(step))
    async with at_work(parts, consuming=False, fitting=False):
        waiting = settle(parts)
        await given_a_chance()
        assert not waiting.done()
        parts.refitter.stop()
        assert await asyncio.wait_for(waiting, TIMEOUT_S / 2) == {"default"}


async def test_a_fit_that_fails_ends_it_at_once_until_there_are_other_labels(start, stream, make) -> None:
    fitter = FailingFitter(1)
    parts = start(lambda: fitter)
    await publish(stream, make, 0, 1)
    async with at_work(parts):
        for _ in range(2):
            assert await asyncio.wait_for(settle(parts), TIMEOUT_S / 2) == {"default"}
        await publish(stream, make, 2)
        assert await settle(parts) == SETTLED
        assert fitter.num_fits == 2


async def test_a_domain_whose_fit_fails_does_not_keep_the_question_from_the_others(start, make) -> None:
    held = HeldFitter()
    fitters = iter([FailingFitter(1), held])
    parts = start(lambda: next(fitters))
    for step in range(2):
        for domain in ("fails", "holds"):
            parts.estimator.learn(make.label(step, group_id=domain, domain=domain))
    async with at_work(parts, consuming=False):
        waiting = settle(parts, "fails", "holds")
        await until(lambda: held.num_begun == 1)
        await given_a_chance()
        assert not waiting.done()
        held.go.release()
        assert await waiting == {"fails"}
        assert parts.estimator.probes["holds"].num_added == 2


async def test_domains_of_other_runs_are_not_waited_for_and_told_of_as_they_are(start, make) -> None:
    """Fits go by name: one domain is fitted, one fails, one is held, and the last has to wait for that."""
    held = HeldFitter()
    fitters = iter([MeanFitter(), FailingFitter(1), held])
    parts = start(lambda: next(fitters))
    for step in range(2):
        for domain in ("a.mine", "b.fails", "c.holds", "d.waits"):
            parts.estimator.learn(make.label(step, group_id=domain, domain=domain))
    async with at_work(parts, consuming=False):
        await until(lambda: held.num_begun == 1)
        for asked in ("a.mine", "never.seen"):
            behind = await asyncio.wait_for(settle(parts, asked), TIMEOUT_S / 2)
            assert behind == {"b.fails", "c.holds", "d.waits"}
        assert await settle(parts, "a.mine", "c.holds", limit_s=0.01) == {"b.fails", "c.holds", "d.waits"}
        held.go.release()


async def test_a_domain_that_the_run_has_taught_is_waited_for_whichever_is_asked_about(start, stream, make) -> None:
    """The rest of the step may be asked about in another request."""
    held = HeldFitter()
    parts = start(lambda: held)
    await MemoryQueue(stream, "publisher").publish(
        [make.message(make.label(step, run_id="asks", domain="taught")).SerializeToString() for step in range(2)]
    )
    async with at_work(parts):
        waiting = settle(parts, "another")
        await until(lambda: held.num_begun == 1)
        await given_a_chance()
        assert not waiting.done()
        held.go.release()
        assert await waiting == SETTLED


async def test_a_queue_that_is_away_is_waited_for(start, stream, make, monkeypatch) -> None:
    parts = start()
    for method in ("newest", "holds", "read"):
        real, refusals = getattr(parts.queue, method), iter(range(2))

        async def away(*arguments, real=real, refusals=refusals, **options):
            if next(refusals, None) is not None:
                raise BackendDown("Redis is away")
            return await real(*arguments, **options)

        monkeypatch.setattr(parts.queue, method, away)
    await publish(stream, make, 0, 1)
    settling = settle(parts)
    await given_a_chance()
    assert not settling.done()
    async with at_work(parts):
        assert await settling == SETTLED
        assert parts.estimator.probes["default"].num_added == 2


async def test_a_queue_that_stays_away_ends_it_at_the_limit(start, monkeypatch) -> None:
    parts = start()

    async def away(**options):
        raise BackendDown("Redis is away")

    for method in ("newest", "read", "depth"):
        monkeypatch.setattr(parts.queue, method, away)
    async with at_work(parts):
        assert await settle(parts, limit_s=0.05) is UNKNOWN


async def test_whoever_gives_up_waiting_leaves_nothing_behind(start, stream, make) -> None:
    parts = start()
    await publish(stream, make, 0)
    async with at_work(parts, consuming=False, fitting=False):
        tasks = asyncio.all_tasks()
        waiting = settle(parts)
        await given_a_chance()
        change = parts.changes.next()
        assert change._waiters  # type: ignore[attr-defined]
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not change._waiters  # type: ignore[attr-defined]
        assert asyncio.all_tasks() == tasks


async def test_any_number_may_wait(start, stream, make) -> None:
    parts = start()
    await publish(stream, make, 0, 1, 2)
    waiting = [settle(parts) for _ in range(5)]
    await given_a_chance()
    async with at_work(parts):
        assert await asyncio.gather(*waiting) == [SETTLED] * 5
