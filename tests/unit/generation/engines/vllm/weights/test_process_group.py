"""Receiving in a worker of a vLLM that may die meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from poise.errors import BackendDown
from poise.generation.engines.vllm import worker_calls as vllm_calls
from poise.generation.engines.vllm.weights.process_group import WorkerReceiver
from poise.generation.weights.payload import Body
from poise.runtime.network.broadcast_group import Rendezvous

BODY = Body(Rendezvous("gloo", "key"), (3, 4), b"header", Path("weights"), 30.0)


class FakeEngine:
    """Notes what it is told; gives one of `outcomes` at each question, and no answer where there is none left."""

    def __init__(self, *outcomes: str | None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.outcomes = list(outcomes)
        self.errored = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.told.append((method, *args))
        if method == "poise_received":
            if not self.outcomes:
                await asyncio.Event().wait()
            return [self.outcomes.pop(0)]
        return [None]

    @property
    def methods(self) -> list[str]:
        return [method for method, *_ in self.told]


async def test_the_worker_is_told_and_asked_until_all_came() -> None:
    engine = FakeEngine(None, None, "")
    await WorkerReceiver(engine).receive(BODY)
    assert engine.told[0] == ("poise_receive", "gloo", "key", [3, 4], b"header", "weights", 30.0)
    assert engine.methods[1:] == ["poise_received"] * 3


async def test_what_did_not_come_is_given_up() -> None:
    engine = FakeEngine(None, "the sender left")
    with pytest.raises(BackendDown, match="the sender left"):
        await WorkerReceiver(engine).receive(BODY)
    assert engine.methods == ["poise_receive", "poise_received", "poise_received", "poise_abandon"]


async def test_an_engine_that_died_is_neither_waited_for_nor_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_calls, "_LOOK_S", 0.01)
    engine = FakeEngine(None)
    receiving = asyncio.create_task(WorkerReceiver(engine).receive(BODY))
    await asyncio.sleep(0.1)
    assert not receiving.done()
    engine.errored = True
    with pytest.raises(BackendDown, match="ended"):
        await asyncio.wait_for(receiving, 10)
    assert "poise_abandon" not in engine.methods
