"""Tests of the `vllm` engine only: its processes, steps that run ahead, and caches."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tests.contract.test_engines import (
    NUM_BLOCK_TOKENS,
    Reference,
    assert_close,
    assert_nothing_open,
    long_prompt,
    sample,
    sample_all,
)
from tests.support.tiny_models import make_tiny_llama, make_tiny_qwen2
from tests.support.vllm_processes import forked_processes

from poise.algorithms.features import POOL_TOKENS, response_window
from poise.errors import BackendDown
from poise.generation.config import GenerationConfig, VllmConfig
from poise.generation.engines.vllm.engine import VllmEngine
from poise.generation.engines.vllm.recorder import RUN_ON_TOKENS
from poise_client.types import Rollout, Sampling

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
on_engines_loop = pytest.mark.asyncio(loop_scope="module")

DEADLINE_S = 60.0
VERSIONS = itertools.count(100)

SERVER = """
import asyncio, sys, warnings
warnings.simplefilter("ignore")

async def serve(model):
    from poise.generation.config import GenerationConfig, VllmConfig
    from poise.generation.engines.vllm.engine import VllmEngine
    from tests.support.vllm_processes import forked_processes

    engine = VllmEngine(GenerationConfig(model=model, max_num_seqs=2, vllm=VllmConfig(kv_cache_gib=0.01)))
    with forked_processes():
        await engine.start()
    print("READY", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def reference(folder: Path) -> Reference:
    return Reference(folder)


@contextlib.asynccontextmanager
async def started(folder: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(
        GenerationConfig(model=str(folder), max_num_seqs=4, vllm=VllmConfig(kv_cache_gib=0.01, threads=1))
    )
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch, forked_processes():
        patch.setenv("TMPDIR", temporary)  # no other engine of this machine may hold the memory lock
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[VllmEngine]:
    # The last test that uses it kills it, so tests must run in the order of this file.
    async with started(folder) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def qwen2(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    # The last test that uses it kills it, too.
    async with started(make_tiny_qwen2(tmp_path_factory.mktemp("qwen2"))) as engine:
        yield engine


async def check_rollout(engine: VllmEngine, reference: Reference) -> None:
    sampling = Sampling(max_tokens=20, seed=0)
    rollout = await sample(engine, [65, 66], sampling)
    reference.check([65, 66], sampling, rollout, engine.info.feature_layer)


async def check_updates(
    engine: VllmEngine, reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch, *, first_version: int
) -> None:
    """Update with and without preparation, in every order. Preparing must not change what is served."""

    async def prepare_nothing(_: Path) -> None:
        """Behave as if memory were short."""

    for number, is_prepared in enumerate((True, True, False, False, True)):
        version = first_version + number
        weights = reference.write_weights(folder / f"{number}.safetensors", seed=number)
        if is_prepared:
            await engine.prepare_weights(weights)
            await check_rollout(engine, reference)
            reference.use(weights)
            weights.unlink()  # so only prepared weights can be loaded
            await engine.load_weights(weights, version)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(engine, "prepare_weights", prepare_nothing)
                await engine.update_weights(weights, version)
            reference.use(weights)
        await check_rollout(engine, reference)


async def cross_an_update(
    engine: VllmEngine, prompt: list[int], samplings: list[Sampling], original: Path, weights: Path
) -> tuple[list[Rollout], int]:
    """Return rollouts, some of which an update to `weights` interrupted, and the version of the update."""
    deadline = time.monotonic() + DEADLINE_S
    for trial in itertools.count(1):
        assert time.monotonic() < deadline, "no rollout was long enough to see the update"
        await engine.update_weights(original, next(VERSIONS))
        await sample(engine, prompt, Sampling(max_tokens=1))  # so that the cache has the prompt
        running = [asyncio.create_task(sample(engine, prompt, sampling)) for sampling in samplings]
        await asyncio.sleep(0.3 / trial)
        version = next(VERSIONS)
        await engine.update_weights(weights, version)
        rollouts = await asyncio.gather(*running)
        if any(len(rollout.version_spans) > 1 for rollout in rollouts):
            break
    return rollouts, version


@on_engines_loop
async def test_states_are_right_far_past_a_stop_string(engine: VllmEngine, reference: Reference) -> None:
    prompt = engine.tokenize("run on")
    free = await sample(engine, prompt, Sampling(max_tokens=400, seed=4))
    stop = next(free.text[i : i + 2] for i in range(8, 60) if free.text[i : i + 2].isascii())
    sampling = Sampling(max_tokens=400, seed=4, stop=(stop,))
    task = asyncio.create_task(sample(engine, prompt, sampling))
    await asyncio.sleep(0)  # once to submit; then the engine samples while nothing reads its outputs
    for _ in range(3):
        await asyncio.sleep(0.001)
        time.sleep(0.4)
    rollout = await task
    num_tokens = rollout.token_ids.size
    assert free.token_ids.size > num_tokens + POOL_TOKENS + RUN_ON_TOKENS, (
        "the free rollout must be long enough to run on"
    )
    assert response_window(num_tokens, None, POOL_TOKENS).end == num_tokens - 1
    assert rollout.token_ids.tolist() == free.token_ids[:num_tokens].tolist()
    reference.check(prompt, sampling, rollout, engine.info.feature_layer)


@on_engines_loop
async def test_tokens_after_an_update_come_from_the_new_weights(
    engine: VllmEngine, reference: Reference, folder: Path, tmp_path: Path
) -> None:
    """New weights must not read keys and values of the old ones from the cache."""
    original, weights = folder / "model.safetensors", reference.write_weights(tmp_path / "new.safetensors", seed=8)
    sampling = Sampling(max_tokens=400, seed=4)
    (rollout,), _ = await cross_an_update(engine, [65, 66], [sampling], original, weights)
    old, new = rollout.version_spans
    assert 0 < old.end_token == new.start_token < new.end_token == rollout.token_ids.size
    for span, served in ((old, original), (new, weights)):
        reference.use(served)
        reference.check_tokens([65, 66], sampling, rollout, span)
    await engine.update_weights(original, next(VERSIONS))


@pytest.fixture
def num_cached(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompt tokens each finished rollout read from the cache, as vLLM counts them."""
    counts: list[int] = []
    generate = engine.llm.generate

    async def generate_and_count(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        output = None
        async for output in generate(*args, **kwargs):
            yield output
        assert output is not None
        counts.append(output.num_cached_tokens)

    monkeypatch.setattr(engine.llm, "generate", generate_and_count)
    return counts


@on_engines_loop
async def test_cached_prompts_still_pool_all_their_last_states(
    engine: VllmEngine, reference: Reference, num_cached: list[int]
) -> None:
    """All rollouts but the first read the blocks before the pooled tokens from the cache."""
    block = NUM_BLOCK_TOKENS
    lengths = {300: 2 * block, 2 * block: block, 2 * block + POOL_TOKENS: 2 * block, 2 * block + POOL_TOKENS - 1: block}
    for length, num_read in lengths.items():
        prompt = long_prompt(length, seed=length)
        samplings = [Sampling(max_tokens=3, seed=i) for i in range(5)]
        num_cached.clear()
        rollouts = await sample_all(engine, [prompt] * 4, samplings[:4])
        assert sorted(num_cached) == [0, num_read, num_read, num_read]
        rollouts.append(await sample(engine, prompt, samplings[4]))
        assert num_cached[4:] == [num_read]
        for sampling, rollout in zip(samplings, rollouts, strict=True):
            reference.check(prompt, sampling, rollout, engine.info.feature_layer)


@on_engines_loop
@pytest.mark.parametrize(("num_alike", "num_read"), [(299, 256), (200, 128), (100, 0)])
async def test_prompts_share_only_their_common_beginning(
    engine: VllmEngine, reference: Reference, num_cached: list[int], num_alike: int, num_read: int
) -> None:
    beginning = long_prompt(num_alike, seed=num_alike)
    sampling = Sampling(max_tokens=20, seed=1)
    for seed in (1001, 1002):
        prompt = beginning + long_prompt(300 - num_alike, seed=seed)
        reference.check(prompt, sampling, await sample(engine, prompt, sampling), engine.info.feature_layer)
    encoding = await engine.encode("g", beginning)
    assert_close(encoding.prompt_hidden, reference.prompt_hidden(beginning, engine.info.feature_layer))
    assert num_cached[:2] == [0, num_read]


@on_engines_loop
async def test_update_clears_the_prefix_cache(
    engine: VllmEngine, reference: Reference, folder: Path, tmp_path: Path, num_cached: list[int]
) -> None:
    """For later prompts and for running rollouts."""
    prompt = long_prompt(300, seed=7)
    original, weights = folder / "model.safetensors", reference.write_weights(tmp_path / "new.safetensors", seed=9)
    short, long = Sampling(max_tokens=8, seed=5), Sampling(max_tokens=200, seed=5)
    samplings = [dataclasses.replace(long, seed=i) for i in range(4)]
    crossing, version = await cross_an_update(engine, prompt, samplings, original, weights)
    later = next(VERSIONS)
    await engine.update_weights(weights, later)
    num_cached.clear()
    after = [await sample(engine, prompt, short) for _ in range(2)]
    assert num_cached == [0, 256]
    for served in (original, weights):
        reference.use(served)
        for rollout in crossing:
            for span in rollout.version_spans:
                if (span.policy_version == version) == (served == weights):
                    reference.check_tokens(prompt, long, rollout, span)
    for rollout in after:
        assert [span.policy_version for span in rollout.version_spans] == [later]
        reference.check(prompt, short, rollout, engine.info.feature_layer)
    await engine.update_weights(original, next(VERSIONS))


@on_engines_loop
async def test_cancelling_the_first_sibling_does_not_affect_others(engine: VllmEngine, reference: Reference) -> None:
    sampling = Sampling(max_tokens=8, seed=2)
    for trial in range(6):
        prompt = long_prompt(300, seed=100 + trial)
        first, *siblings = [asyncio.create_task(sample(engine, prompt, sampling)) for _ in range(4)]
        await asyncio.sleep(0.005 * trial)
        first.cancel()
        for rollout in await asyncio.wait_for(asyncio.gather(*siblings), DEADLINE_S):
            reference.check(prompt, sampling, rollout, engine.info.feature_layer)
    await assert_nothing_open(engine)


@on_engines_loop
async def test_prepared_weights_do_not_need_their_file(
    engine: VllmEngine, reference: Reference, folder: Path, tmp_path: Path
) -> None:
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=9)
    await engine.prepare_weights(weights)
    reference.use(weights)
    weights.unlink()
    await engine.load_weights(weights, 3)
    await check_rollout(engine, reference)
    await engine.update_weights(folder / "model.safetensors", 4)


@on_engines_loop
async def test_weights_are_served_exactly_prepared_or_not(
    engine: VllmEngine, reference: Reference, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_updates(engine, reference, tmp_path, monkeypatch, first_version=5)
    await engine.update_weights(folder / "model.safetensors", 10)


@on_engines_loop
async def test_death_of_a_process_is_noticed(engine: VllmEngine) -> None:
    assert engine.is_alive()
    running = [asyncio.create_task(sample(engine, [65, 66], Sampling(max_tokens=400))) for i in range(8)]
    await asyncio.sleep(0.05)
    (worker,) = _children("VLLM::Worker")
    worker.kill()
    outcomes = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), DEADLINE_S)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert failures, "all rollouts finished before the worker died"
    assert all(isinstance(failure, BackendDown) for failure in failures)
    assert not engine.is_alive()
    with pytest.raises(BackendDown):
        await sample(engine, [65, 66], Sampling(max_tokens=4))


@on_engines_loop
async def test_biases_and_an_untied_head_are_updated(
    qwen2: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(Path(qwen2.info.model))
    await check_updates(qwen2, reference, tmp_path, monkeypatch, first_version=1)


@on_engines_loop
async def test_update_ends_if_the_engine_dies(qwen2: VllmEngine, tmp_path: Path) -> None:
    weights = Reference(Path(qwen2.info.model)).write_weights(tmp_path / "new.safetensors", seed=1)
    core = max(_children("VLLM::EngineCore"), key=psutil.Process.create_time)
    core.suspend()
    calls = [asyncio.create_task(call) for call in (qwen2.prepare_weights(weights), qwen2.load_weights(weights, 6))]
    await asyncio.sleep(0.5)
    assert not any(call.done() for call in calls)
    core.kill()
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), DEADLINE_S)
    assert all(isinstance(outcome, BackendDown) for outcome in outcomes)
    assert not qwen2.is_alive()


def _children(title: str) -> set[psutil.Process]:
    return {child for child in psutil.Process().children(recursive=True) if _is_titled(child, title)}


def _is_titled(process: psutil.Process, title: str) -> bool:
    with contextlib.suppress(psutil.Error):  # of an engine that was stopped before
        return process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline())
    return False


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script, folder], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_no_process_outlives_the_server(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        assert "custom scheduler class" not in line
        if line.startswith("READY"):
            break
    else:
        pytest.fail("the server did not start")
    children = [psutil.Process(pid) for pid in psutil.pids() if pid != server.pid and _session(pid) == server.pid]
    assert len(children) >= 2
    os.kill(server.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
