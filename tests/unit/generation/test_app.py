"""When the generation service is ready, and what ends it."""

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
from poise.generation.engines.transformers.engine import TorchEngine
from poise.generation.served_policy import ServedPolicy
from poise.runtime.service import Readiness

Build = Callable[..., GenerationConfig]


@pytest.fixture
async def app(config: Build, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GenerationApp]:
    monkeypatch.setattr(app_module, "_WATCH_EVERY_S", 0.001)
    app = GenerationApp(config(), ScriptedEngine())
    yield app
    await app.stop()


def engine_of(app: GenerationApp) -> ScriptedEngine:
    engine = app._engine
    assert isinstance(engine, ScriptedEngine)
    return engine


async def test_ready_between_start_and_drain(app: GenerationApp) -> None:
    assert app.readiness() == Readiness(False, "the model is still loading")
    assert app.status()["engine"] is None
    await app.start()
    assert app.readiness() == Readiness(True)
    await app.drain()
    assert app.readiness() == Readiness(False, "the generation service is shutting down")


async def test_metrics_say_when_the_model_is_loaded(app: GenerationApp) -> None:
    assert app.registry.get_sample_value("poise_generation_loaded") == 0
    await app.start()
    assert app.registry.get_sample_value("poise_generation_loaded") == 1


async def test_pause_and_resume_are_told(app: GenerationApp) -> None:
    await app.start()
    await app.pause()
    assert not app.readiness().ready
    assert "resume" in app.readiness().reason
    assert app.status()["paused"] is True
    await app.resume()
    assert app.readiness().ready
    assert app.status()["paused"] is False


async def test_waits_for_the_learner_only_when_asked_to(config: Build) -> None:
    app = GenerationApp(config(wait_for_learner=True), ScriptedEngine())
    await app.start()
    assert app.readiness() == Readiness(False, "waiting for a learner to push the weights")
    app._servicer.pushes.policy = ServedPolicy("a", 0, b"x" * 32)
    assert app.readiness().ready
    await app.stop()


async def test_status_tells_what_is_served(app: GenerationApp) -> None:
    await app.start()
    app._servicer.pushes.policy = ServedPolicy("a", 4, b"\x01\xff")
    status = app.status()
    assert (status["lineage_id"], status["policy_version"], status["digest"]) == ("a", 4, "01ff")
    assert status["engine"]["model"] == "scripted"
    assert json.loads(json.dumps(status))["engine"]["tokenizer_digest"] == "ff00"
    assert app.registry.get_sample_value("poise_generation_running_rollouts") == 0


async def test_death_of_the_engine_is_the_end_of_the_process(app: GenerationApp) -> None:
    await app.start()
    assert not app.failed.is_set()
    engine_of(app).die()
    assert app.readiness() == Readiness(False, "the engine died")
    await asyncio.wait_for(app.failed.wait(), 20)
    assert app.failure == "the engine died"


async def test_stop_is_no_death(app: GenerationApp) -> None:
    await app.start()
    await app.stop()
    await asyncio.sleep(0.01)
    assert not app.failed.is_set()
    assert not engine_of(app).is_alive()


async def test_start_clears_what_a_killed_process_left(app: GenerationApp) -> None:
    left = app.config.staging_dir / "poise-weights-abc"
    left.mkdir(parents=True)
    (left / "x.safetensors").write_bytes(b"x")
    await app.start()
    assert list(app.config.staging_dir.iterdir()) == []


async def test_model_that_cannot_be_loaded_is_named(config: Build) -> None:
    app = build(config(model="/nowhere/at/all", engine="torch"))
    assert isinstance(app._engine, TorchEngine)
    with pytest.raises(BackendDown, match="/nowhere/at/all cannot be loaded"):
        await app.start()
    await app.stop()


async def test_a_hung_engine_ends_the_process_and_a_slow_or_idle_one_does_not(
    app: GenerationApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(sampler_module, "time", SimpleNamespace(monotonic=lambda: now_s))  # the loop's goes on
    await app.start()
    sampler = app._servicer.sampler
    now_s = 10_000.0  # with nothing to do
    await asyncio.sleep(0.01)
    assert not app.failed.is_set()
    async with sampler._slot():
        now_s += 599.0
        async with sampler._slot():
            pass
        now_s += 599.0
        await asyncio.sleep(0.01)
        assert not app.failed.is_set()
        now_s += 2.0
        await app.failed.wait()
    assert app.failure == "the engine hangs: nothing has come out of it for 600 s"
