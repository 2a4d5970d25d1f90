"""One suite for the scripted engine of other tests and the `torch` engine, so that the fake cannot differ."""

from __future__ import annotations

import asyncio
import itertools
import json
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.support.scripted_engine import PARAMETERS, ScriptedEngine
from tests.support.tiny_models import make_tiny_llama

from poise.errors import BackendDown, InvalidRequest
from poise.generation.config import GenerationConfig
from poise.generation.engine import Engine, EngineRequest
from poise.generation.engines.transformers.engine import TorchEngine
from poise.generation.weights.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from poise_client.types import Rollout, RolloutId, Sampling

MAX_MODEL_LEN = 64
DEADLINE_S = 60.0


@dataclass
class Case:
    """An engine that is not started, and weights that fit it."""

    engine: Engine
    weights: dict[str, np.ndarray]
    adapted: str
    """Name of a linear module's weight."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture(params=["scripted", "torch"])
async def case(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Case]:
    threads = torch.get_num_threads()
    if request.param == "torch":
        weights = load_file(folder / "model.safetensors")
        config = GenerationConfig(model=str(folder), engine="torch", lora={"max_rank": 2})
        case = Case(TorchEngine(config), weights, "model.layers.1.mlp.up_proj.weight")
    else:
        arrays = {name: np.ones(shape, np.float32) for name, shape in PARAMETERS.items()}
        case = Case(ScriptedEngine(max_model_len=MAX_MODEL_LEN), arrays, "first.weight")
    yield case
    await case.engine.stop()
    torch.set_num_threads(threads)


@pytest.fixture
async def engine(case: Case) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers' imports
        await case.engine.start()
    return case.engine


IDS = itertools.count()


async def sample(engine: Engine, prompt: list[int], **sampling: object) -> Rollout:
    return await engine.generate(EngineRequest(RolloutId("run", 0, "g", next(IDS)), prompt, Sampling(**sampling)))  # type: ignore[arg-type]


async def test_engine_is_alive_between_start_and_stop(case: Case) -> None:
    engine = case.engine
    assert not engine.is_alive()
    with pytest.raises(BackendDown, match="loading"):
        _ = engine.info
    await engine.start()
    assert engine.is_alive()
    assert engine.info.max_model_len == MAX_MODEL_LEN
    await engine.stop()
    assert not engine.is_alive()
    await engine.stop()
    assert engine.info.max_model_len == MAX_MODEL_LEN  # the process still reports it while it stops


async def test_stopped_engine_rejects_all_calls(engine: Engine, tmp_path: Path) -> None:
    await engine.stop()
    with pytest.raises(BackendDown):
        await sample(engine, [65], max_tokens=2)
    with pytest.raises(BackendDown):
        await engine.encode("g", [65])
    with pytest.raises(BackendDown):
        await engine.update_weights(tmp_path / "weights.safetensors", 1)
    with pytest.raises(BackendDown):
        await engine.update_adapter(tmp_path, 1)


async def test_calls_during_a_stop_end_as_unavailable(engine: Engine) -> None:
    calls = [asyncio.create_task(engine.encode("g", [65] * length)) for length in range(1, 40)]
    calls += [asyncio.create_task(sample(engine, [65], max_tokens=20)) for _ in range(4)]
    await asyncio.sleep(0)
    await engine.stop()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(error) for error in errors} <= {BackendDown}
    assert not any(call.cancelled() for call in calls)


async def test_prompts_become_ids_of_the_vocabulary(engine: Engine) -> None:
    chat = engine.tokenize([{"role": "user", "content": "hi"}])
    text = engine.tokenize("hi")
    assert engine.tokenize("") == []
    assert len(text) == 2
    assert len(chat) > len(text)
    assert all(isinstance(token, int) and 0 <= token < engine.info.vocabulary_size for token in chat + text)


@pytest.mark.parametrize("max_tokens", [1, 2, 30])
async def test_rollouts_are_whole(engine: Engine, max_tokens: int) -> None:
    rollout = await sample(engine, [65, 66], max_tokens=max_tokens, seed=1)
    length = rollout.token_ids.size
    assert 1 <= length <= max_tokens
    assert rollout.finish_reason == ("length" if length == max_tokens else "stop")
    assert rollout.token_ids.dtype == np.int32
    assert (rollout.logprobs.shape, rollout.logprobs.dtype) == ((length,), np.float32)
    for values in (rollout.token_entropies, rollout.sum_squared_probs):
        assert (values.shape, values.dtype) == ((length,), np.float16)
    assert (rollout.logprobs <= 0).all()
    assert (rollout.token_entropies >= 0).all()
    assert ((rollout.sum_squared_probs > 0) & (rollout.sum_squared_probs <= 1)).all()
    features = rollout.features
    for state in (features.prompt_hidden, features.response_hidden):
        assert (state.shape, state.dtype) == ((engine.info.hidden_size,), np.float32)
    assert features.response_hidden.any() == (length > 1)
    assert features.output_entropy.mean == pytest.approx(rollout.token_entropies.mean(dtype=float), rel=1e-3)
    assert features.output_entropy.last == pytest.approx(float(rollout.token_entropies[-1]), rel=1e-3)
    assert [(span.start_token, span.end_token) for span in rollout.version_spans] == [(0, length)]
    assert 0 < rollout.first_token_s <= rollout.total_s


async def test_prompt_can_leave_space_for_a_single_token(engine: Engine) -> None:
    rollout = await sample(engine, [65] * (MAX_MODEL_LEN - 1), max_tokens=1)
    assert rollout.token_ids.size == 1


async def test_seed_decides(engine: Engine) -> None:
    async def tokens(seed: int | None) -> list[int]:
        return (await sample(engine, [65, 66], max_tokens=20, seed=seed)).token_ids.tolist()

    assert await tokens(7) == await tokens(7) != await tokens(8)
    assert await tokens(2**63 - 1)
    assert await tokens(None) != await tokens(None)


async def test_cancelled_rollout_ends_at_once(engine: Engine) -> None:
    if isinstance(engine, ScriptedEngine):
        engine.before_rollout = lambda request: asyncio.sleep(0.01 if request.sampling.seed else 1000)
    kept = asyncio.create_task(sample(engine, [65], max_tokens=20, seed=1))
    doomed = asyncio.create_task(sample(engine, [65], max_tokens=60, seed=0))
    await asyncio.sleep(0)
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(doomed, DEADLINE_S)
    assert (await asyncio.wait_for(kept, DEADLINE_S)).token_ids.size > 0


async def test_encoding_equals_the_state_of_rollouts(engine: Engine) -> None:
    encodings = [await engine.encode("g", prompt) for prompt in ([65, 66], [65] * (MAX_MODEL_LEN - 1))]
    for encoding in encodings:
        state = encoding.prompt_hidden
        assert (state.shape, state.dtype, encoding.policy_version) == ((engine.info.hidden_size,), np.float32, 0)
    rollout = await sample(engine, [65, 66], max_tokens=3)
    np.testing.assert_allclose(encodings[0].prompt_hidden, rollout.features.prompt_hidden, rtol=1e-4, atol=1e-6)
    assert not np.allclose(encodings[0].prompt_hidden, encodings[1].prompt_hidden)


async def test_encoding_has_the_version_that_computed_it(case: Case, engine: Engine, tmp_path: Path) -> None:
    save_file(case.weights, tmp_path / "weights.safetensors")
    await engine.update_weights(tmp_path / "weights.safetensors", 3)
    assert (await engine.encode("g", [65, 66])).policy_version == 3


async def test_cancelled_encoding_ends_at_once(engine: Engine) -> None:
    if isinstance(engine, ScriptedEngine):
        engine.before_rollout = lambda request: asyncio.sleep(0.01 if request.prompt_token_ids == [65] else 1000)
    kept, doomed = (asyncio.create_task(engine.encode("g", prompt)) for prompt in ([65], [66]))
    await asyncio.sleep(0)
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(doomed, DEADLINE_S)
    assert (await asyncio.wait_for(kept, DEADLINE_S)).prompt_hidden.any()


async def test_new_weights_show_in_the_spans(case: Case, engine: Engine, tmp_path: Path) -> None:
    assert (await sample(engine, [65], max_tokens=3)).version_spans[0].policy_version == 0
    save_file(case.weights, tmp_path / "weights.safetensors")
    for version in (3, 4, 1):  # a new lineage can start at any version
        assert await engine.update_weights(tmp_path / "weights.safetensors", version) > 0
        assert {s.policy_version for s in (await sample(engine, [65], max_tokens=3)).version_spans} == {version}


def write_adapter(case: Case, folder: Path, rank: int = 2) -> Path:
    out, width = case.weights[case.adapted].shape
    prefix = f"base_model.model.{case.adapted.removesuffix('.weight')}"
    arrays = {"lora_A": np.ones((rank, width), np.float32), "lora_B": np.ones((out, rank), np.float32)}
    save_file({f"{prefix}.{side}.weight": array for side, array in arrays.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    return folder


async def test_new_adapters_show_in_the_spans(case: Case, engine: Engine, tmp_path: Path) -> None:
    for version in (3, 4, 1):
        assert await engine.update_adapter(write_adapter(case, tmp_path), version) > 0
        assert {s.policy_version for s in (await sample(engine, [65], max_tokens=3)).version_spans} == {version}
        assert (await engine.encode("g", [65])).policy_version == version


@pytest.mark.parametrize("spoil", ["another rank", "no config", "no weights"])
async def test_adapters_that_do_not_fit_change_nothing(case: Case, engine: Engine, tmp_path: Path, spoil: str) -> None:
    write_adapter(case, tmp_path, rank=3 if spoil == "another rank" else 2)
    if spoil != "another rank":
        (tmp_path / (CONFIG_FILE if spoil == "no config" else WEIGHTS_FILE)).unlink()
    with pytest.raises(InvalidRequest):
        await engine.update_adapter(tmp_path, 3)
    assert engine.is_alive()
    assert (await sample(engine, [65], max_tokens=3)).version_spans[0].policy_version == 0


def drop_one(arrays: dict[str, np.ndarray]) -> None:
    del arrays[min(arrays)]


def add_one(arrays: dict[str, np.ndarray]) -> None:
    arrays["another.weight"] = np.ones(2, np.float32)


def grow_one(arrays: dict[str, np.ndarray]) -> None:
    arrays[min(arrays)] = np.ones((7, 7, 7), np.float32)


@pytest.mark.parametrize("spoil", [drop_one, add_one, grow_one, None])
async def test_weights_that_do_not_fit_change_nothing(
    case: Case, engine: Engine, tmp_path: Path, spoil: Callable[[dict[str, np.ndarray]], None] | None
) -> None:
    path = tmp_path / "weights.safetensors"
    arrays = dict(case.weights)
    if spoil is not None:
        spoil(arrays)
    save_file(arrays, path)
    if spoil is None:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidRequest):
        await engine.update_weights(path, 3)
    assert engine.is_alive()
    assert (await sample(engine, [65], max_tokens=3)).version_spans[0].policy_version == 0
