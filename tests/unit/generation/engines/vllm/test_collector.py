from __future__ import annotations

import asyncio
from typing import Any

import pytest

from poise.algorithms.features import Span
from poise.errors import BackendDown
from poise.generation.engines.vllm import worker_client
from poise.generation.engines.vllm.collector import Collector


class FakeEngine:
    """Answers each call with records of the wanted ids, from the second of two ranks, once it may."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], list[str]]] = []
        self.may_answer = asyncio.Event()
        self.error: Exception | None = None
        self.errored = False

    async def collective_rpc(self, method: str, args: tuple[list[Any], list[str]]) -> list[Any]:
        assert method == "poise_collect"
        self.calls.append(args)
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return [None, [f"record of {rollout_id}" for rollout_id, *_ in args[0]]]


def start(collector: Collector, *names: str) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(collector.collect(name, 7, Span(1, 6))) for name in names]


async def test_rollouts_that_finish_during_a_call_share_the_next() -> None:
    engine = FakeEngine()
    collector = Collector(engine)
    tasks = start(collector, "a")
    await asyncio.sleep(0.01)
    tasks += start(collector, "b", "c")
    dropping = asyncio.create_task(collector.drop("d"))
    await asyncio.sleep(0.01)
    assert engine.calls == [([("a", 7, 1, 6)], [])]
    engine.may_answer.set()
    assert await asyncio.gather(*tasks) == ["record of a", "record of b", "record of c"]
    await dropping
    assert engine.calls[1:] == [([("b", 7, 1, 6), ("c", 7, 1, 6)], ["d"])]
    (later,) = start(collector, "e")
    assert await later == "record of e"


async def test_cancelled_caller_does_not_affect_others() -> None:
    engine = FakeEngine()
    collector = Collector(engine)
    doomed, kept = start(collector, "a", "b")
    await asyncio.sleep(0.01)
    doomed.cancel()
    await asyncio.sleep(0)
    engine.may_answer.set()
    assert await kept == "record of b"
    assert doomed.cancelled()


async def test_dead_engine_leaves_no_caller_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "_CHECK_ALIVE_S", 0.01)
    engine = FakeEngine()
    tasks = start(Collector(engine), "a", "b")
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in tasks)
    engine.errored = True
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert all(isinstance(outcome, BackendDown) for outcome in outcomes)


async def test_failure_reaches_every_caller_and_the_next_call_is_made() -> None:
    engine = FakeEngine()
    engine.error = RuntimeError("worker died")
    engine.may_answer.set()
    collector = Collector(engine)
    outcomes = await asyncio.gather(*start(collector, "a", "b"), collector.drop("c"), return_exceptions=True)
    assert all(isinstance(outcome, BackendDown) and "worker died" in str(outcome) for outcome in outcomes)
    engine.error = None
    (later,) = start(collector, "d")
    assert await later == "record of d"
