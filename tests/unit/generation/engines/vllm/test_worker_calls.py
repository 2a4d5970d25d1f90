"""No call outlives the engine that should answer it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from poise.errors import BackendDown
from poise.generation.engines.vllm import worker_calls as vllm_calls
from poise.generation.engines.vllm.worker_calls import answered, ask_workers


class FakeEngine:
    """Answers with the call, when told to."""

    def __init__(self) -> None:
        self.errored = False
        self.may_answer = asyncio.Event()
        self.was_cancelled = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return [method, *args]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_calls, "_LOOK_S", 0.01)


async def test_workers_are_called_and_their_answers_returned() -> None:
    engine = FakeEngine()
    asking = asyncio.create_task(ask_workers(engine, "poise_collect", [1], "two"))
    await asyncio.sleep(0.05)
    assert not asking.done()
    engine.may_answer.set()
    assert await asking == ["poise_collect", [1], "two"]


async def test_a_call_that_a_dead_engine_leaves_unanswered_ends() -> None:
    engine = FakeEngine()
    asking = asyncio.create_task(ask_workers(engine, "poise_collect"))
    await asyncio.sleep(0.05)
    assert not asking.done()
    engine.errored = True
    with pytest.raises(BackendDown, match="ended"):
        await asyncio.wait_for(asking, 10)
    assert engine.was_cancelled


async def test_what_the_engine_answered_before_it_died_counts() -> None:
    engine = FakeEngine()
    engine.may_answer.set()
    engine.errored = True
    assert await ask_workers(engine, "poise_collect") == ["poise_collect"]


async def test_errors_and_cancellation_reach_the_other_end() -> None:
    async def fail() -> None:
        raise ValueError("no such method")

    with pytest.raises(ValueError, match="no such method"):
        await answered(FakeEngine(), fail())
    engine = FakeEngine()
    asking = asyncio.create_task(ask_workers(engine, "poise_collect"))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0)
    assert engine.was_cancelled
