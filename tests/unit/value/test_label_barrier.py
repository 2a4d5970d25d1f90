"""`wait_for_labels`: when it waits, and when the wait ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from tests.support.memory_queue import MemoryQueue, MemoryStream
from tests.unit.value.harness import TIMEOUT_S, BlockedFitter, FailingFitter, Harness, MeanFitter, until

import poise.value.updater
from poise.errors import BackendDown
from poise.value.label_barrier import wait_for_labels


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(poise.value.updater, "READ_WAIT_S", 0.01)
    monkeypatch.setattr(poise.value.updater, "FIRST_RETRY_S", 0.001)


@pytest.fixture
def stream() -> MemoryStream:
    return MemoryStream()


@pytest.fixture
def start(config, stream) -> Callable[..., Harness]:
    return lambda make_fitter=MeanFitter, **changes: Harness(config(**changes), stream, make_fitter)


def wait(harness: Harness, *domains: str, limit_s: float = TIMEOUT_S) -> asyncio.Task[frozenset[str] | None]:
    """Wait for a request of a separate run, about the default domain if none is named."""
    return asyncio.create_task(wait_for_labels(harness.updater, "asks", domains or ("default",), limit_s))


UP_TO_DATE: frozenset[str] = frozenset()
UNKNOWN = None


async def run_other_tasks() -> None:
    """Yield until every task is blocked."""
    for _ in range(50):
        await asyncio.sleep(0)


async def publish(stream: MemoryStream, make, *steps: int) -> None:
    await MemoryQueue(stream, "publisher").publish([make.payload(step) for step in steps])


async def test_it_ends_when_the_probe_is_fitted_on_all_labels(start, stream, make) -> None:
    harness = start(queue={"batch_entries": 2})
    await publish(stream, make, *range(7))
    waiting = wait(harness)
    await run_other_tasks()
    assert not waiting.done()
    async with harness.running():
        assert await waiting == UP_TO_DATE
        assert harness.state.probes["default"].num_added == 7
        assert not stream.unread
        assert not stream.pending


async def test_it_waits_for_labels_that_are_not_saved(start, stream, make, monkeypatch) -> None:
    harness = start()
    save, begun, go = harness.store.save, threading.Event(), threading.Event()

    def held(snapshot):
        begun.set()
        assert go.wait(TIMEOUT_S)
        return save(snapshot)

    monkeypatch.setattr(harness.store, "save", held)
    await publish(stream, make, 0)
    async with harness.running():
        waiting = wait(harness)
        await until(begun.is_set)
        await run_other_tasks()
        assert harness.state.num_groups_consumed == 1
        assert not waiting.done()
        go.set()
        assert await waiting == UP_TO_DATE


async def test_it_waits_for_the_current_fit_and_the_next(start, stream, make) -> None:
    fitter = BlockedFitter()
    harness = start(lambda: fitter)
    async with harness.running():
        await publish(stream, make, 0, 1)
        await until(lambda: fitter.num_begun == 1)
        await publish(stream, make, 2)
        await until(lambda: not stream.unread and not stream.pending)
        waiting = wait(harness)
        fitter.go.release()
        await until(lambda: fitter.num_begun == 2)
        await run_other_tasks()
        assert not waiting.done()
        fitter.go.release()
        assert await waiting == UP_TO_DATE
        assert harness.state.probes["default"].num_added == 3


async def test_the_wait_ends_with_the_fit(start, make) -> None:
    harness = start()
    for step in range(2):
        harness.state.learn(make.label(step))
    async with harness.running():
        assert await asyncio.wait_for(wait(harness), TIMEOUT_S / 2) == UP_TO_DATE


async def test_it_ignores_labels_learnt_during_the_wait(start, stream, make) -> None:
    fitter = BlockedFitter()
    harness = start(lambda: fitter, queue={"batch_entries": 1})
    await publish(stream, make, 0, 1)
    async with harness.running():
        waiting = wait(harness)
        await until(lambda: fitter.num_begun == 1)
        await publish(stream, make, 2)
        await until(lambda: not stream.unread and not stream.pending)
        fitter.go.release()
        assert await asyncio.wait_for(waiting, TIMEOUT_S / 2) == UP_TO_DATE  # although another fit is blocked
        fitter.go.release()


async def test_it_ignores_entries_published_during_the_wait(start, stream, make, monkeypatch) -> None:
    harness = start(queue={"batch_entries": 1}, probe={"warmup_steps": 9})
    save, num_saves, go = harness.store.save, iter(range(9)), threading.Event()

    def all_but_the_first_held(snapshot):
        assert next(num_saves) == 0 or go.wait(TIMEOUT_S)
        return save(snapshot)

    monkeypatch.setattr(harness.store, "save", all_but_the_first_held)
    await publish(stream, make, 0)
    waiting = wait(harness)
    await run_other_tasks()
    await publish(stream, make, 1)
    async with harness.running():
        assert await asyncio.wait_for(waiting, TIMEOUT_S / 2) == UP_TO_DATE
        assert stream.unread or stream.pending
        go.set()


async def test_without_labels_it_returns_immediately_even_if_paused(start, stream) -> None:
    harness = start()
    harness.updater.pause()
    async with harness.running():
        assert await wait(harness) == UP_TO_DATE


async def test_a_domain_in_its_warm_up_is_up_to_date(start, stream, make) -> None:
    harness = start(probe={"warmup_steps": 3})
    await publish(stream, make, 0, 1)
    async with harness.running():
        assert await wait(harness) == UP_TO_DATE
        assert not harness.state.probes


async def test_the_time_limit_ends_the_wait(start, stream, make) -> None:
    harness = start()
    await publish(stream, make, 0)
    with harness.opened():
        assert await wait(harness, limit_s=0.01) is UNKNOWN


@pytest.mark.parametrize("halt", ["pause", "stop"])
async def test_it_ends_when_consumption_halts(start, stream, make, halt) -> None:
    harness = start()
    await publish(stream, make, 0)
    with harness.opened():
        waiting = wait(harness)
        await run_other_tasks()
        assert not waiting.done()
        getattr(harness.updater, halt)()
        assert await asyncio.wait_for(waiting, TIMEOUT_S / 2) is UNKNOWN
        assert await asyncio.wait_for(wait(harness), TIMEOUT_S / 2) is UNKNOWN


async def test_it_ends_when_fitting_stops(start, make) -> None:
    harness = start()
    for step in range(2):
        harness.state.learn(make.label(step))
    with harness.opened():
        waiting = wait(harness)
        await run_other_tasks()
        assert not waiting.done()
        harness.updater.stop()
        assert await asyncio.wait_for(waiting, TIMEOUT_S / 2) == {"default"}


async def test_a_failed_fit_ends_the_wait_until_new_labels_arrive(start, stream, make) -> None:
    fitter = FailingFitter(1)
    harness = start(lambda: fitter)
    await publish(stream, make, 0, 1)
    async with harness.running():
        for _ in range(2):
            assert await asyncio.wait_for(wait(harness), TIMEOUT_S / 2) == {"default"}
        await publish(stream, make, 2)
        assert await wait(harness) == UP_TO_DATE
        assert fitter.num_fits == 2


async def test_a_failed_domain_does_not_end_the_wait_for_others(start, make) -> None:
    held = BlockedFitter()
    fitters = iter([FailingFitter(1), held])
    harness = start(lambda: next(fitters))
    for step in range(2):
        for domain in ("fails", "holds"):
            harness.state.learn(make.label(step, group_id=domain, domain=domain))
    async with harness.running():
        waiting = wait(harness, "fails", "holds")
        await until(lambda: held.num_begun == 1)
        await run_other_tasks()
        assert not waiting.done()
        held.go.release()
        assert await waiting == {"fails"}
        assert harness.state.probes["holds"].num_added == 2


async def test_it_does_not_wait_for_domains_of_other_runs(start, make) -> None:
    """Fits run in the order of names: one succeeds, one fails, one is blocked, and the last waits for it."""
    held = BlockedFitter()
    fitters = iter([MeanFitter(), FailingFitter(1), held])
    harness = start(lambda: next(fitters))
    for step in range(2):
        for domain in ("a.mine", "b.fails", "c.holds", "d.waits"):
            harness.state.learn(make.label(step, group_id=domain, domain=domain))
    async with harness.running():
        await until(lambda: held.num_begun == 1)
        for requested in ("a.mine", "never.seen"):
            behind = await asyncio.wait_for(wait(harness, requested), TIMEOUT_S / 2)
            assert behind == {"b.fails", "c.holds", "d.waits"}
        assert await wait(harness, "a.mine", "c.holds", limit_s=0.01) == {"b.fails", "c.holds", "d.waits"}
        held.go.release()


async def test_it_waits_for_all_domains_of_the_run(start, stream, make) -> None:
    """Another request may need the other domains of the step."""
    held = BlockedFitter()
    harness = start(lambda: held)
    await MemoryQueue(stream, "publisher").publish(
        [make.message(make.label(step, run_id="asks", domain="taught")).SerializeToString() for step in range(2)]
    )
    async with harness.running():
        waiting = wait(harness, "another")
        await until(lambda: held.num_begun == 1)
        await run_other_tasks()
        assert not waiting.done()
        held.go.release()
        assert await waiting == UP_TO_DATE


async def test_it_waits_for_a_queue_that_is_unreachable(start, stream, make, monkeypatch) -> None:
    harness = start()
    for method in ("newest_unacked", "has_unacked_up_to", "read"):
        real, failures = getattr(harness.queue, method), iter(range(2))

        async def away(*arguments, real=real, failures=failures, **options):
            if next(failures, None) is not None:
                raise BackendDown("Redis is away")
            return await real(*arguments, **options)

        monkeypatch.setattr(harness.queue, method, away)
    await publish(stream, make, 0, 1)
    waiting = wait(harness)
    await run_other_tasks()
    assert not waiting.done()
    async with harness.running():
        assert await waiting == UP_TO_DATE
        assert harness.state.probes["default"].num_added == 2


async def test_the_time_limit_holds_while_the_queue_is_unreachable(start, monkeypatch) -> None:
    harness = start()

    async def away(**options):
        raise BackendDown("Redis is away")

    for method in ("newest_unacked", "read", "depth"):
        monkeypatch.setattr(harness.queue, method, away)
    async with harness.running():
        assert await wait(harness, limit_s=0.05) is UNKNOWN


async def test_a_cancelled_wait_leaves_no_task(start, stream, make) -> None:
    harness = start()
    await publish(stream, make, 0)
    with harness.opened():
        tasks = asyncio.all_tasks()
        waiting = wait(harness)
        await run_other_tasks()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asyncio.all_tasks() == tasks


async def test_many_requests_can_wait(start, stream, make) -> None:
    harness = start()
    await publish(stream, make, 0, 1, 2)
    waiting = [wait(harness) for _ in range(5)]
    await run_other_tasks()
    async with harness.running():
        assert await asyncio.gather(*waiting) == [UP_TO_DATE] * 5
