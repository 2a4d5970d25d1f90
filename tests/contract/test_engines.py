"""One suite for every engine. Compares rollouts with one forward pass of transformers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import make_tiny_llama
from tests.support.vllm_processes import forked_processes

from poise.algorithms.features import POOL_TOKENS, ResponseSpans, Span, prompt_window
from poise.algorithms.score_weighted import squared_score_norms
from poise.errors import InvalidRequest
from poise.generation.config import GenerationConfig, TorchConfig, VllmConfig
from poise.generation.engine import Engine, EngineRequest
from poise.generation.feature_pooling import build_features, mean_or_zeros, pooled_response
from poise.generation.prompts.tokenizer import Tokenizer
from poise.generation.sampler import Sampler
from poise_client.types import Prompt, Rollout, RolloutId, Sampling, VersionSpan

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

MAX_MODEL_LEN = 512
NUM_BLOCK_TOKENS = 128
"""Tokens per block of vLLM's KV cache on a CPU."""

POOLED = {"prompt_pool_tokens": 7, "response_pool_tokens": 13}
"""Not the defaults, which `test_vllm_engine` uses."""

TOLERANCE = 1e-4
HALF_ROUNDING = 2**-11
DEADLINE_S = 60.0

ROLLOUT_INDICES = itertools.count()
"""Versions must rise over the whole module, so that each test can push."""
VERSIONS = itertools.count(1)


class Reference:
    """The model in transformers, with weights for tests to push."""

    def __init__(
        self, folder: Path, prompt_pool_tokens: int = POOL_TOKENS, response_pool_tokens: int = POOL_TOKENS
    ) -> None:
        self.folder = folder
        self._prompt_pool_tokens, self._response_pool_tokens = prompt_pool_tokens, response_pool_tokens
        self.tokenizer = Tokenizer.load(str(folder))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def use(self, weights: Path) -> None:
        missing = self._model.load_state_dict(load_file(weights), strict=False).missing_keys
        assert missing in ([], ["lm_head.weight"])

    def write_weights(self, path: Path, *, seed: int, scale: float = 0.1) -> Path:
        generator = torch.Generator().manual_seed(seed)
        save_file(
            {
                name: parameter.detach() * (1 + scale * torch.randn(parameter.shape, generator=generator))
                for name, parameter in self._model.named_parameters()
            },
            path,
        )
        return path

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], sampling: Sampling, token_ids: list[int]) -> np.ndarray:
        _, logprobs = self._forward(prompt, sampling, token_ids)
        return _of_tokens(logprobs, token_ids)

    @torch.inference_mode()
    def check_tokens(self, prompt: list[int], sampling: Sampling, rollout: Rollout, span: VersionSpan) -> None:
        """Compare the statistics of a span's tokens with those of the whole sequence under the current weights."""
        token_ids = rollout.token_ids.tolist()
        _, logprobs = self._forward(prompt, sampling, token_ids)
        _check_statistics(logprobs, token_ids, rollout, slice(span.start_token, span.end_token))

    def _forward(self, prompt: list[int], sampling: Sampling, token_ids: list[int]) -> tuple[Any, torch.Tensor]:
        outputs = self._model(torch.tensor([prompt + token_ids]), output_hidden_states=True)
        logits = outputs.logits[0, len(prompt) - 1 : -1]
        return outputs, torch.log_softmax(logits / (sampling.temperature or 1.0), -1)

    @torch.inference_mode()
    def check(self, prompt: list[int], sampling: Sampling, rollout: Rollout, layer: int) -> None:
        """Compare all numbers of a rollout with a separate forward pass."""
        token_ids = rollout.token_ids.tolist()
        outputs, logprobs = self._forward(prompt, sampling, token_ids)
        entropies = _check_statistics(logprobs, token_ids, rollout, slice(0, len(token_ids)))
        states = outputs.hidden_states[layer + 1][0].numpy()
        window, spans = self.pooled_response(token_ids)
        expected_features = build_features(
            mean_or_zeros(states, prompt_window(len(prompt), self._prompt_pool_tokens)),
            mean_or_zeros(states[len(prompt) :], window),
            entropies,
            spans,
        )
        assert_close(rollout.features.prompt_hidden, expected_features.prompt_hidden)
        assert_close(rollout.features.response_hidden, expected_features.response_hidden)
        for part in ("output_entropy", "reasoning_entropy", "answer_entropy"):
            found, wanted = getattr(rollout.features, part), getattr(expected_features, part)
            for statistic in ("mean", "last", "max", "min"):
                assert getattr(found, statistic) == pytest.approx(getattr(wanted, statistic), abs=TOLERANCE)

    def pooled_response(self, token_ids: list[int]) -> tuple[Span, ResponseSpans]:
        return pooled_response(self.tokenizer.token_texts(token_ids), self._response_pool_tokens)

    @torch.inference_mode()
    def prompt_hidden(self, prompt: list[int], layer: int) -> np.ndarray:
        states = self._model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer + 1][0].numpy()
        pooled: np.ndarray = states[-self._prompt_pool_tokens :].mean(axis=0)
        return pooled


def _check_statistics(logprobs: torch.Tensor, token_ids: list[int], rollout: Rollout, part: slice) -> np.ndarray:
    """Compare a part of a rollout's token statistics with exact distributions. Return all exact entropies."""
    own = _of_tokens(logprobs, token_ids)
    entropies: np.ndarray = torch.special.entr(logprobs.exp()).sum(-1).numpy()
    squares = logprobs.double().exp().square().sum(-1).numpy()
    assert rollout.logprobs.size == rollout.token_entropies.size == rollout.sum_squared_probs.size == len(token_ids)
    for found, expected, rtol in (
        (rollout.logprobs, own, 0.0),
        (rollout.token_entropies, entropies, HALF_ROUNDING),
        (rollout.sum_squared_probs, squares, HALF_ROUNDING),
    ):
        np.testing.assert_allclose(found[part], expected[part], atol=TOLERANCE, rtol=rtol)
    norms = squared_score_norms(rollout.logprobs, rollout.sum_squared_probs)
    exact_norms = 1.0 - 2.0 * np.exp(own.astype(np.float64)) + squares
    np.testing.assert_allclose(norms[part], exact_norms[part], atol=HALF_ROUNDING / 2 + TOLERANCE, rtol=0)
    return entropies


def _of_tokens(logprobs: torch.Tensor, token_ids: list[int]) -> np.ndarray:
    return logprobs[torch.arange(len(token_ids)), torch.tensor(token_ids)].numpy()


def assert_close(found: Any, wanted: Any) -> None:
    assert np.linalg.norm(found - wanted) <= TOLERANCE * max(np.linalg.norm(wanted), 1e-6)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=MAX_MODEL_LEN), **POOLED)


def make_engine(kind: str, folder: Path) -> Engine:
    config = GenerationConfig(
        model=str(folder),
        max_num_seqs=8,
        **POOLED,
        vllm=VllmConfig(kv_cache_gib=2 / 1024, threads=1),  # 15 blocks
        torch=TorchConfig(threads=1),
    )
    if kind == "torch":
        from poise.generation.engines.transformers.engine import TorchEngine

        return TorchEngine(config)
    from poise.generation.engines.vllm.engine import VllmEngine

    return VllmEngine(config)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def started(request: pytest.FixtureRequest, reference: Reference) -> AsyncIterator[Engine]:
    engine = make_engine(request.param, reference.folder)
    with forked_processes():
        await engine.start()
    yield engine
    await engine.stop()
    assert not engine.is_alive()
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started: Engine, reference: Reference) -> AsyncIterator[Engine]:
    """The started engine, serving the weights of the folder, and free of rollouts before and after."""
    yield started
    await assert_nothing_open(started)
    if next(VERSIONS) > 1:
        original = reference.folder / "model.safetensors"
        await started.update_weights(original, next(VERSIONS))
        reference.use(original)


async def assert_nothing_open(engine: Engine) -> None:
    if not hasattr(engine, "num_open_rollouts"):
        return
    deadline = time.monotonic() + DEADLINE_S
    while await engine.num_open_rollouts():
        assert time.monotonic() < deadline, f"{await engine.num_open_rollouts()} rollouts are never freed"
        await asyncio.sleep(0.05)


async def sample(engine: Engine, prompt: list[int], sampling: Sampling) -> Rollout:
    return await engine.generate(EngineRequest(RolloutId("run", 0, "g", next(ROLLOUT_INDICES)), prompt, sampling))


async def sample_all(engine: Engine, prompts: list[list[int]], samplings: list[Sampling]) -> list[Rollout]:
    return await asyncio.gather(*(sample(engine, p, s) for p, s in zip(prompts, samplings, strict=True)))


def long_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, num_tokens).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40, seed=1),
        Sampling(max_tokens=40, seed=1, temperature=0.7),
        Sampling(max_tokens=40, seed=1, top_p=0.5),
        Sampling(max_tokens=40, seed=1, temperature=1.3, top_p=0.8, top_k=20),
        Sampling(max_tokens=40, seed=1, top_k=3),
        Sampling(max_tokens=40, temperature=0.0),
    ],
    ids=str,
)
async def test_rollout_agrees_with_a_separate_pass(engine: Engine, reference: Reference, sampling: Sampling) -> None:
    prompt = engine.tokenize("What is the capital of France?")
    rollout = await sample(engine, prompt, sampling)
    assert 1 <= rollout.token_ids.size <= sampling.max_tokens
    assert rollout.logprobs.dtype == np.float32
    assert rollout.token_entropies.dtype == rollout.sum_squared_probs.dtype == np.float16
    assert rollout.features.prompt_hidden.dtype == rollout.features.response_hidden.dtype == np.float32
    assert 0 < rollout.first_token_s <= rollout.total_s
    reference.check(prompt, sampling, rollout, engine.info.feature_layer)


async def test_rollouts_of_mixed_sampling_share_steps(engine: Engine, reference: Reference) -> None:
    samplings = [
        Sampling(max_tokens=30, seed=i, temperature=t, top_p=p)
        for i, (t, p) in enumerate(itertools.product((0.0, 0.7, 1.0), (0.6, 1.0)))
    ]
    prompts = [long_prompt(length, seed=length) for length in (1, 3, 9, 10, 11, 140)]
    for prompt, sampling, rollout in zip(prompts, samplings, await sample_all(engine, prompts, samplings), strict=True):
        reference.check(prompt, sampling, rollout, engine.info.feature_layer)


async def test_repeated_prompts_and_siblings_have_the_same_states(engine: Engine, reference: Reference) -> None:
    prompt = long_prompt(300)
    sampling = Sampling(max_tokens=3, seed=0)
    sequential = [await sample(engine, prompt, sampling) for _ in range(2)]
    siblings = await sample_all(engine, [prompt] * 4, [Sampling(max_tokens=3, seed=i) for i in range(4)])
    for rollout in [*sequential, *siblings]:
        reference.check(prompt, sampling, rollout, engine.info.feature_layer)


async def test_more_long_seeded_prompts_than_a_step_holds(engine: Engine, reference: Reference) -> None:
    prompts = [long_prompt(400, seed=i) for i in range(10)]
    samplings = [Sampling(max_tokens=4, seed=i) for i in range(10)]
    for prompt, sampling, rollout in zip(prompts, samplings, await sample_all(engine, prompts, samplings), strict=True):
        reference.check(prompt, sampling, rollout, engine.info.feature_layer)


async def test_more_rollouts_than_fit_at_once(engine: Engine, reference: Reference) -> None:
    """vLLM admits eight prompts of one block, has no second block for all of them, and preempts one."""
    prompts = [long_prompt(NUM_BLOCK_TOKENS - 3, seed=i) for i in range(8)]
    samplings = [Sampling(max_tokens=150, seed=i) for i in range(8)]
    rollouts = await sample_all(engine, prompts, samplings)
    assert all(rollout.token_ids.size > 3 for rollout in rollouts)
    for prompt, sampling, rollout in zip(prompts, samplings, rollouts, strict=True):
        reference.check(prompt, sampling, rollout, engine.info.feature_layer)


async def test_prompt_of_one_token(engine: Engine, reference: Reference) -> None:
    sampling = Sampling(max_tokens=1, seed=0)
    rollout = await sample(engine, [65], sampling)
    assert not rollout.features.response_hidden.any()
    reference.check([65], sampling, rollout, engine.info.feature_layer)


async def test_prompt_with_space_for_one_response_token(engine: Engine, reference: Reference) -> None:
    assert engine.info.max_model_len == MAX_MODEL_LEN
    prompt = long_prompt(MAX_MODEL_LEN - 1)
    sampling = Sampling(max_tokens=1, seed=0)
    rollout = await sample(engine, prompt, sampling)
    assert rollout.token_ids.size == 1
    reference.check(prompt, sampling, rollout, engine.info.feature_layer)


async def test_empty_and_too_long_prompts_are_rejected(engine: Engine, reference: Reference) -> None:
    """The sampler checks them with the engine's limit, because engines expect valid prompts."""
    sampler = Sampler(engine, GenerationConfig(model=str(reference.folder)))
    over = [Prompt("tokens", long_prompt(MAX_MODEL_LEN)), Prompt("text", "a" * (MAX_MODEL_LEN + 1)), Prompt("none", "")]
    with pytest.raises(InvalidRequest) as caught:
        await anext(sampler.sample("run", 0, over, 2, Sampling(max_tokens=1)))
    assert [(violation.field, violation.description.partition(";")[0]) for violation in caught.value.violations] == [
        ("prompts[0].prompt", f"has {MAX_MODEL_LEN} tokens"),
        ("prompts[1].prompt", f"has {MAX_MODEL_LEN + 1} tokens"),
        ("prompts[2].text", "has no tokens"),
    ]
    assert f"max_model_len is {MAX_MODEL_LEN}" in str(caught.value)
    prompt = long_prompt(MAX_MODEL_LEN - 1)  # one token less is accepted
    async with contextlib.aclosing(sampler.sample("run", 0, [Prompt("fits", prompt)], 2, Sampling())) as groups:
        group = await anext(groups)
    assert [rollout.token_ids.size for rollout in group.rollouts] == [1, 1]


async def test_finish_reason_of_a_rollout(engine: Engine, reference: Reference) -> None:
    samplings = [Sampling(max_tokens=150, seed=i) for i in range(12)]
    rollouts = await sample_all(engine, [[65, 66]] * 12, samplings)
    stops = reference.tokenizer.stop_token_ids
    for rollout in rollouts:
        stopped = int(rollout.token_ids[-1]) in stops
        assert not set(rollout.token_ids[:-1].tolist()) & stops
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or rollout.token_ids.size == 150
        assert rollout.text == reference.tokenizer.decode(rollout.token_ids.tolist())
        assert "<|end|>" not in rollout.text
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


async def test_only_the_seed_decides_the_rollout(engine: Engine) -> None:
    prompt = engine.tokenize("seeds")
    sampling = Sampling(max_tokens=30, seed=7)
    alone = await sample(engine, prompt, sampling)
    among = await sample_all(engine, [prompt] * 5, [Sampling(max_tokens=30, seed=i) for i in (3, 7, 7, 9, 11)])
    texts = [rollout.token_ids.tolist() for rollout in among]
    assert texts[1] == texts[2] == alone.token_ids.tolist()
    assert len({tuple(text) for text in texts}) == 4


async def test_rollouts_without_a_seed_differ(engine: Engine) -> None:
    rollouts = await sample_all(engine, [[65, 66]] * 6, [Sampling(max_tokens=20)] * 6)
    assert len({tuple(rollout.token_ids.tolist()) for rollout in rollouts}) == 6


async def test_stop_string_ends_the_rollout_and_stays_in_it(engine: Engine, reference: Reference) -> None:
    prompt = engine.tokenize("stop here")
    free = await sample(engine, prompt, Sampling(max_tokens=60, seed=2))
    ascii_pairs = [free.text[i : i + 2] for i in range(15, len(free.text) - 1) if free.text[i : i + 2].isascii()]
    stop = ascii_pairs[0]
    sampling = Sampling(max_tokens=60, seed=2, stop=("never in there", stop))
    rollout = await sample(engine, prompt, sampling)
    length = rollout.token_ids.size
    assert rollout.finish_reason == "stop"
    assert length < free.token_ids.size
    assert rollout.token_ids.tolist() == free.token_ids[:length].tolist()
    assert stop in rollout.text
    assert stop not in reference.tokenizer.decode(rollout.token_ids[:-1].tolist())
    reference.check(prompt, sampling, rollout, engine.info.feature_layer)


def cut_at(rollout: Rollout, stop: int) -> list[int]:
    """Return a rollout's tokens up to the first `stop`."""
    token_ids: list[int] = rollout.token_ids.tolist()
    return token_ids[: token_ids.index(stop) + 1]


@pytest.mark.parametrize(
    ("special", "stops"),
    [
        ("<|user|>", {"stop": ("<|user|>",)}),
        ("<|assistant|>", {"stop": ("never in there", "<|assistant|>")}),
        ("<|user|>", {"stop_token_ids": "<|user|>"}),
        ("q", {"stop_token_ids": "q"}),
    ],
)
async def test_special_tokens_and_token_ids_end_the_rollout(
    engine: Engine, reference: Reference, special: str, stops: dict[str, Any]
) -> None:
    (stop,) = engine.tokenize(special)
    if "stop_token_ids" in stops:
        stops = {"stop_token_ids": (stop,)}
    samplings = [Sampling(max_tokens=150, seed=seed) for seed in range(24)]
    free = await sample_all(engine, [[65, 66]] * 24, samplings)
    seeds = [seed for seed, rollout in enumerate(free) if stop in rollout.token_ids[:-1]]
    assert len(seeds) >= 3
    stopping = [dataclasses.replace(samplings[seed], **stops) for seed in seeds]

    found = await sample_all(engine, [[65, 66]] * len(seeds), stopping)

    assert [rollout.token_ids.tolist() for rollout in found] == [cut_at(free[seed], stop) for seed in seeds]
    assert {rollout.finish_reason for rollout in found} == {"stop"}
    assert all("<|" not in rollout.text for rollout in found)
    reference.check([65, 66], stopping[0], found[0], engine.info.feature_layer)


async def test_states_before_the_end_of_the_reasoning_are_pooled(engine: Engine, reference: Reference) -> None:
    """Random rollouts contain the tag by chance, whole and in halves. 24 rollouts are enough for several."""
    samplings = [Sampling(max_tokens=120, seed=i) for i in range(24)]
    rollouts = await sample_all(engine, [[65, 66, 67]] * 24, samplings)
    num_early_windows = 0
    for sampling, rollout in zip(samplings, rollouts, strict=True):
        reference.check([65, 66, 67], sampling, rollout, engine.info.feature_layer)
        window, _ = reference.pooled_response(rollout.token_ids.tolist())
        num_early_windows += window.end < rollout.token_ids.size - 1
    assert num_early_windows >= 3


async def test_prompts_are_encoded_as_by_a_separate_pass(engine: Engine, reference: Reference) -> None:
    """Lengths around the window and vLLM's block size, all at once and beside rollouts."""
    prompts = [long_prompt(length, seed=length) for length in (1, 6, 7, 8, 127, 128, 129, 300, MAX_MODEL_LEN - 1)]
    sampling = Sampling(max_tokens=30, seed=1)
    rollout, *encodings = await asyncio.gather(
        sample(engine, prompts[0], sampling), *(engine.encode("g", prompt) for prompt in prompts)
    )
    reference.check(prompts[0], sampling, rollout, engine.info.feature_layer)
    for prompt, encoding in zip(prompts, encodings, strict=True):
        assert encoding.prompt_hidden.dtype == np.float32
        assert_close(encoding.prompt_hidden, reference.prompt_hidden(prompt, engine.info.feature_layer))


async def test_prompts_are_encoded_by_the_new_weights(engine: Engine, reference: Reference, tmp_path: Path) -> None:
    prompt, version = long_prompt(20), next(VERSIONS)
    before = await engine.encode("g", prompt)
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=9)
    await engine.update_weights(weights, version)
    reference.use(weights)
    after = await engine.encode("g", prompt)
    assert before.policy_version < after.policy_version == version
    assert_close(after.prompt_hidden, reference.prompt_hidden(prompt, engine.info.feature_layer))
    assert np.abs(after.prompt_hidden - before.prompt_hidden).max() > 100 * TOLERANCE


async def test_cancelled_encodings_do_not_affect_others(engine: Engine, reference: Reference) -> None:
    prompt = long_prompt(200)
    tasks = [asyncio.create_task(engine.encode("g", prompt)) for _ in range(30)]
    kept = tasks.pop()
    for count, task in enumerate(tasks):
        if count % 10 == 0:
            await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert_close((await kept).prompt_hidden, reference.prompt_hidden(prompt, engine.info.feature_layer))
    await assert_nothing_open(engine)


async def test_new_weights_are_served_exactly(engine: Engine, reference: Reference, tmp_path: Path) -> None:
    prompt = engine.tokenize("new weights")
    sampling = Sampling(max_tokens=20, seed=0)
    for seed in (1, 2, 3):
        version = next(VERSIONS)
        weights = reference.write_weights(tmp_path / f"{seed}.safetensors", seed=seed)
        assert 0 < await engine.update_weights(weights, version) < DEADLINE_S
        reference.use(weights)
        rollout = await sample(engine, prompt, sampling)
        assert [span.policy_version for span in rollout.version_spans] == [version]
        reference.check(prompt, sampling, rollout, engine.info.feature_layer)


@pytest.mark.parametrize("damage", ["wrong shape", "missing", "unknown", "cut off", "no file"])
async def test_weights_that_do_not_fit_change_nothing(
    engine: Engine, reference: Reference, tmp_path: Path, damage: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=5)
    tensors = load_file(weights)
    named = name
    match damage:
        case "wrong shape":
            tensors[name] = tensors[name].T.contiguous()
        case "missing":
            del tensors[name]
        case "unknown":
            named = "model.layers.9.mlp.up_proj.weight"
            tensors[named] = tensors[name].clone()
    save_file(tensors, weights)
    if damage == "cut off":
        named = "weights"
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "no file":
        named = "weights"
        weights.unlink()
    with pytest.raises(InvalidRequest, match=named):
        await engine.update_weights(weights, next(VERSIONS))
    assert engine.is_alive()
    sampling = Sampling(max_tokens=10, seed=0)
    reference.check([65, 66], sampling, await sample(engine, [65, 66], sampling), engine.info.feature_layer)


async def test_update_in_flight_shows_in_version_spans(engine: Engine, reference: Reference, tmp_path: Path) -> None:
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=6)
    original = reference.folder / "model.safetensors"
    deadline = time.monotonic() + DEADLINE_S
    for seed in itertools.count():
        assert time.monotonic() < deadline, "no rollout was long enough to see the update"
        before, after = next(VERSIONS), next(VERSIONS)
        await engine.update_weights(original, before)
        running = [
            asyncio.create_task(sample(engine, [65, 66], Sampling(max_tokens=500, seed=100 * seed + i)))
            for i in range(4)
        ]
        await asyncio.sleep(0.3)
        await engine.update_weights(weights, after)
        rollouts = await asyncio.gather(*running)
        crossing = [rollout for rollout in rollouts if len(rollout.version_spans) > 1]
        for rollout in rollouts:
            assert rollout.version_spans[0].start_token == 0
            assert rollout.version_spans[-1].end_token == rollout.token_ids.size
        if crossing:
            break
    for rollout in crossing:
        old, new = rollout.version_spans
        assert (old.policy_version, new.policy_version) == (before, after)
        assert 0 < old.end_token == new.start_token
        # Each token is sampled as if the weights of its span had computed the whole sequence.
        for span, path in ((old, original), (new, weights)):
            reference.use(path)
            reference.check_tokens([65, 66], Sampling(), rollout, span)


@pytest.fixture
def aborting(started: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make updates abort running rollouts."""
    monkeypatch.setattr(started, "config", started.config.model_copy(update={"in_flight": "abort"}))


@pytest.mark.usefixtures("aborting")
async def test_aborting_update_ends_rollouts_with_their_tokens(
    engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    weights = reference.write_weights(tmp_path / "new.safetensors", seed=7)
    original = reference.folder / "model.safetensors"
    deadline = time.monotonic() + DEADLINE_S
    for seed in itertools.count():
        assert time.monotonic() < deadline, "no rollout was long enough to meet the update"
        before, after = next(VERSIONS), next(VERSIONS)
        await engine.update_weights(original, before)
        samplings = [Sampling(max_tokens=500, seed=100 * seed + i) for i in range(12)]  # more than run at once
        running = [asyncio.create_task(sample(engine, [65, 66], sampling)) for sampling in samplings]
        await asyncio.sleep(0.3)
        await engine.update_weights(weights, after)
        rollouts = list(zip(samplings, await asyncio.gather(*running), strict=True))
        aborted = [rollout for rollout in rollouts if rollout[1].finish_reason == "abort"]
        if aborted:
            break
    for version, served in ((before, original), (after, weights)):
        reference.use(served)
        for sampling, rollout in rollouts:
            (span,) = rollout.version_spans
            assert (span.start_token, span.end_token) == (0, rollout.token_ids.size)
            if span.policy_version == version:
                reference.check([65, 66], sampling, rollout, engine.info.feature_layer)
    for _, rollout in aborted:
        assert rollout.version_spans[0].policy_version == before
        assert 0 < rollout.token_ids.size < 500


async def test_cancelled_rollouts_do_not_affect_others(engine: Engine, reference: Reference) -> None:
    sampling = Sampling(max_tokens=60, seed=3)
    kept = asyncio.create_task(sample(engine, [65, 66], sampling))
    doomed = [
        asyncio.create_task(sample(engine, [65, 67], Sampling(max_tokens=500, seed=i, temperature=0.0)))
        for i in range(30)
    ]
    for count, task in enumerate(doomed):
        if count % 3 == 0:
            await asyncio.sleep(0.02)
        task.cancel()
    for task in doomed:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    reference.check([65, 66], sampling, await kept, engine.info.feature_layer)
    await assert_nothing_open(engine)
    reference.check([65, 66], sampling, await sample(engine, [65, 66], sampling), engine.info.feature_layer)


async def test_text_is_tokenized_as_is_and_chat_is_rendered(engine: Engine, reference: Reference) -> None:
    chat = engine.tokenize([{"role": "user", "content": "hi"}])
    assert chat == engine.tokenize("<|user|>hi<|end|><|assistant|>")
    assert len(engine.tokenize("hi")) == 2
