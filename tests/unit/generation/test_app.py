"""Readiness of the generation service, and what ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest
from tests.support.scripted_engine import ScriptedEngine

from poise.errors import BackendDown
from poise.generation import app as app_module
from poise.generation import sampler as sampler_module
from poise.generation.app import GenerationApp, build
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineRequest
from poise.generation.engines.transformers.engine import TorchEngine
from poise.generation.sampler import Sampler
from poise.generation.served_policy import ServedPolicy
from poise.runtime.service import Readiness
from poise_client.types import Prompt

Build = Callable[..., GenerationConfig]


@pytest.fixture
async def app(config: Build, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GenerationApp]:
    monkeypatch.setattr(app_module, "_WATCH_INTERVAL_S", 0.001)
    app = GenerationApp(config(), ScriptedEngine())
    yield app
    await app.stop()


def engine_of(app: GenerationApp) -> ScriptedEngine:
    engine = app.engine
    assert isinstance(engine, ScriptedEngine)
    return engine


async def encode(sampler: Sampler, text: str) -> None:
    async for _ in sampler.encode([Prompt("g", text)]):
        pass


async def test_ready_between_start_and_drain(app: GenerationApp) -> None:
    assert app.readiness() == Readiness(False, "the model is still loading")
    assert app.status()["engine"] is None
    await app.start()
    assert app.readiness() == Readiness(True)
    await app.drain()
    assert app.readiness() == Readiness(False, "the generation service is shutting down")


async def test_metric_shows_when_the_model_is_loaded(app: GenerationApp) -> None:
    assert app.registry.get_sample_value("poise_generation_loaded") == 0
    await app.start()
    assert app.registry.get_sample_value("poise_generation_loaded") == 1


async def test_pause_and_resume_change_readiness(app: GenerationApp) -> None:
    await app.start()
    await app.pause()
    assert not app.readiness().ready
    assert "resume" in app.readiness().reason
    assert app.status()["paused"] is True
    await app.resume()
    assert app.readiness().ready
    assert app.status()["paused"] is False


async def test_waits_for_the_learner_only_if_configured(config: Build) -> None:
    app = GenerationApp(config(wait_for_learner=True), ScriptedEngine())
    await app.start()
    assert app.readiness() == Readiness(False, "waiting for a learner to push the weights")
    app.servicer.receiver.policy = ServedPolicy("a", 0, b"x" * 32)
    assert app.readiness().ready
    await app.stop()


async def test_status_shows_what_is_served(app: GenerationApp) -> None:
    await app.start()
    app.servicer.receiver.policy = ServedPolicy("a", 4, b"\x01\xff")
    status = app.status()
    assert (status["lineage_id"], status["policy_version"], status["digest"]) == ("a", 4, "01ff")
    assert status["engine"]["model"] == "scripted"
    assert json.loads(json.dumps(status))["engine"]["tokenizer_digest"] == "ff00"
    assert app.registry.get_sample_value("poise_generation_running_rollouts") == 0


async def test_death_of_the_engine_ends_the_process(app: GenerationApp) -> None:
    await app.start()
    assert not app.failed.is_set()
    engine_of(app).die()
    assert app.readiness() == Readiness(False, "the engine died")
    await asyncio.wait_for(app.failed.wait(), 20)
    assert app.failure == "the engine died"


async def test_stopping_is_not_a_failure(app: GenerationApp) -> None:
    await app.start()
    await app.stop()
    await asyncio.sleep(0.01)
    assert not app.failed.is_set()
    assert not engine_of(app).is_alive()


async def test_start_removes_leftovers_of_a_killed_process(app: GenerationApp) -> None:
    left = app.config.staging_dir / "poise-weights-abc"
    left.mkdir(parents=True)
    (left / "x.safetensors").write_bytes(b"x")
    await app.start()
    assert list(app.config.staging_dir.iterdir()) == []


async def test_model_that_cannot_be_loaded_is_named(config: Build) -> None:
    app = build(config(model="/nowhere/at/all", engine="torch"))
    assert isinstance(app.engine, TorchEngine)
    with pytest.raises(BackendDown, match="/nowhere/at/all cannot be loaded"):
        await app.start()
    await app.stop()


async def test_only_a_hung_engine_ends_the_process(app: GenerationApp, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(sampler_module, "time", SimpleNamespace(monotonic=lambda: now_s))  # asyncio keeps its own clock
    await app.start()
    sampler, engine = app.servicer.sampler, engine_of(app)
    release = asyncio.Event()

    async def hold_long(request: EngineRequest) -> None:
        if len(request.prompt_token_ids) > 1:
            await release.wait()

    engine.before_rollout = hold_long
    now_s = 10_000.0  # idle
    await asyncio.sleep(0.01)
    assert not app.failed.is_set()
    hanging = asyncio.create_task(encode(sampler, "long"))
    while not sampler.num_running:
        await asyncio.sleep(0)
    now_s += 599.0
    await encode(sampler, "x")
    now_s += 599.0
    await asyncio.sleep(0.01)
    assert not app.failed.is_set()
    now_s += 2.0
    await asyncio.wait_for(app.failed.wait(), 20)
    assert app.failure == "the engine hangs: no rollout started or finished for 600 s"
    release.set()
    await hanging
