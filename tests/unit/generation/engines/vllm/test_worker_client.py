"""Calls to workers of an engine that may die before it answers."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from poise.errors import BackendDown
from poise.generation.engines.vllm import worker_client
from poise.generation.engines.vllm.worker_client import call_engine, call_workers, prepare_weights, receive_payload
from poise.generation.weights.process_group import GroupPayload
from poise.runtime.network.broadcast_group import Rendezvous

PAYLOAD = GroupPayload(Rendezvous("gloo", b"key"), (3, 4), b"header", Path("weights"), 30.0)


@pytest.fixture(autouse=True)
def _checks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "_CHECK_ALIVE_S", 0.01)


class EchoEngine:
    """Answers with the call once `may_answer` is set."""

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


async def test_workers_are_called_and_their_results_returned() -> None:
    engine = EchoEngine()
    call = asyncio.create_task(call_workers(engine, "poise_collect", [1], "two"))
    await asyncio.sleep(0.05)
    assert not call.done()
    engine.may_answer.set()
    assert await call == ["poise_collect", [1], "two"]


async def test_call_to_a_dead_engine_ends() -> None:
    engine = EchoEngine()
    call = asyncio.create_task(call_workers(engine, "poise_collect"))
    await asyncio.sleep(0.05)
    assert not call.done()
    engine.errored = True
    with pytest.raises(BackendDown, match="died"):
        await asyncio.wait_for(call, 10)
    assert engine.was_cancelled


async def test_answer_from_before_the_death_is_returned() -> None:
    engine = EchoEngine()
    engine.may_answer.set()
    engine.errored = True
    assert await call_workers(engine, "poise_collect") == ["poise_collect"]


async def test_errors_and_cancellation_reach_the_other_end() -> None:
    async def fail() -> None:
        raise ValueError("no such method")

    with pytest.raises(ValueError, match="no such method"):
        await call_engine(EchoEngine(), fail())
    engine = EchoEngine()
    call = asyncio.create_task(call_workers(engine, "poise_collect"))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)
    assert engine.was_cancelled


class ReceivingEngine:
    """Returns one of `outcomes` per question, and does not answer when none is left."""

    def __init__(self, *outcomes: str | None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.outcomes = list(outcomes)
        self.errored = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, *args))
        if method == "poise_receive_outcome":
            if not self.outcomes:
                await asyncio.Event().wait()
            return [self.outcomes.pop(0)]
        return [None]

    @property
    def methods(self) -> list[str]:
        return [method.removeprefix("poise_") for method, *_ in self.calls]


async def test_worker_is_polled_until_the_payload_arrived() -> None:
    engine = ReceivingEngine(None, None, "")
    await receive_payload(engine, PAYLOAD)
    assert engine.calls[0] == ("poise_receive_payload", "gloo", b"key", [3, 4], b"header", "weights", 30.0)
    assert engine.methods[1:] == ["receive_outcome"] * 3


async def test_payload_that_does_not_arrive_is_aborted() -> None:
    engine = ReceivingEngine(None, "the sender left")
    with pytest.raises(BackendDown, match="the sender left"):
        await receive_payload(engine, PAYLOAD)
    assert engine.methods == ["receive_payload", "receive_outcome", "receive_outcome", "abort_receive"]


async def test_dead_engine_is_not_waited_for_and_not_called() -> None:
    engine = ReceivingEngine(None)
    receiving = asyncio.create_task(receive_payload(engine, PAYLOAD))
    await asyncio.sleep(0.1)
    assert not receiving.done()
    engine.errored = True
    with pytest.raises(BackendDown, match="died"):
        await asyncio.wait_for(receiving, 10)
    assert "abort_receive" not in engine.methods


class PreparingEngine:
    """Two ranks that report the same obstacle, and have finished at the second question."""

    errored = False

    def __init__(self) -> None:
        self.obstacle: tuple[int, str] = (logging.NOTSET, "")
        self.preparing = [[True, False], [False, False]]

    async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[Any]:
        if method == "poise_prepare_weights":
            assert args == ("weights",)
            return [list(self.obstacle)] * 2
        assert method == "poise_is_preparing"
        return self.preparing.pop(0) if len(self.preparing) > 1 else self.preparing[0]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
async def test_obstacle_is_logged_once_until_it_changes(level: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = PreparingEngine()
    last = ""
    for obstacle in ("no memory", "no memory", "", "no memory", "no lock"):
        engine.obstacle = (level, obstacle)
        last = await prepare_weights(engine, Path("weights"), last)
        assert last == obstacle
    assert [record.levelno for record in caplog.records] == [level] * 3
    logged = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert logged == ["no memory", "no memory", "no lock"]


async def test_prepared_weights_are_awaited_without_a_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = PreparingEngine()
    assert await prepare_weights(engine, Path("weights"), "no memory") == ""
    assert len(engine.preparing) == 1
    assert not caplog.records
