"""One suite for every engine that serves adapters. Compares with peft's unmerged model in transformers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import pytest_asyncio
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.contract.test_engines import (
    MAX_MODEL_LEN,
    POOLED,
    TOLERANCE,
    Reference,
    assert_nothing_open,
    long_prompt,
    sample,
    sample_all,
)
from tests.support.tiny_models import make_tiny_llama
from tests.support.vllm_processes import forked_processes

from poise.errors import InvalidRequest
from poise.generation.config import GenerationConfig, LoraConfig, TorchConfig, VllmConfig
from poise.generation.engine import Engine
from poise_client.types import Rollout, Sampling

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

MAX_RANK = 8
PROMPT = [65, 66, 67, 68]
LONG = Sampling(max_tokens=400)
VERSIONS = itertools.count(1)


class AdaptedReference(Reference):
    """The model in transformers, with an adapter from peft."""

    def use(self, weights: Path) -> None:
        """Use the adapter in a folder."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")
        self._model = peft.PeftModel.from_pretrained(base, weights).eval()

    def use_base(self) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval()

    def write_adapter(self, folder: Path, *, seed: int, rank: int = MAX_RANK, modules: object = "all-linear") -> Path:
        """Write a random adapter with peft that changes what the model samples."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")
        config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=modules, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture
def reference(folder: Path) -> AdaptedReference:
    return AdaptedReference(folder, **POOLED)


def make_engine(kind: str, folder: Path, **changes: object) -> Engine:
    settings: dict[str, object] = {
        "model": str(folder),
        "max_num_seqs": 8,
        "lora": LoraConfig(max_rank=MAX_RANK),
        "vllm": VllmConfig(kv_cache_gib=0.01, threads=1),
        "torch": TorchConfig(threads=1),
    }
    config = GenerationConfig(**settings | POOLED | changes)  # type: ignore[arg-type]
    if kind == "torch":
        from poise.generation.engines.transformers.engine import TorchEngine

        return TorchEngine(config)
    from poise.generation.engines.vllm.engine import VllmEngine

    return VllmEngine(config)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def started(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Engine]:
    engine = make_engine(request.param, folder)
    with forked_processes():
        await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started: Engine) -> AsyncIterator[Engine]:
    yield started
    await assert_nothing_open(started)


async def start_rollouts(engine: Engine) -> list[asyncio.Task[Rollout]]:
    """Start long rollouts and return once they have sampled some tokens."""
    running = [asyncio.create_task(sample(engine, PROMPT, LONG)) for _ in range(7)]
    await sample(engine, PROMPT, Sampling(max_tokens=5, temperature=0.0))
    return running


async def check(engine: Engine, reference: AdaptedReference, *, version: int) -> None:
    """Use the same prompts each time, one of them long: an adapter must not read the cache of another."""
    samplings = [Sampling(max_tokens=30, seed=i, temperature=t) for i, t in enumerate((1.0, 0.7, 0.0, 1.0))]
    prompts = [PROMPT, PROMPT, PROMPT, long_prompt(300)]
    rollouts = await sample_all(engine, prompts, samplings)
    for prompt, sampling, rollout in zip(prompts, samplings, rollouts, strict=True):
        assert [span.policy_version for span in rollout.version_spans] == [version]
        reference.check(prompt, sampling, rollout, engine.info.feature_layer)
    encoding = await engine.encode("g", PROMPT)
    assert encoding.policy_version == version
    expected = reference.prompt_hidden(PROMPT, engine.info.feature_layer)
    np.testing.assert_allclose(encoding.prompt_hidden, expected, atol=TOLERANCE)


async def test_running_rollouts_continue_under_the_first_adapter(
    engine: Engine, reference: AdaptedReference, tmp_path: Path
) -> None:
    """Must run first: until then the engine serves the model as it was loaded."""
    adapter = reference.write_adapter(tmp_path, seed=1)
    await check(engine, reference, version=0)
    running = await start_rollouts(engine)
    version = next(VERSIONS)
    assert await engine.update_adapter(adapter, version) > 0
    crossing = [rollout for rollout in await asyncio.gather(*running) if len(rollout.version_spans) > 1]
    assert crossing, "all rollouts finished before the adapter came"
    for rollout in crossing:
        old, new = rollout.version_spans
        assert (old.policy_version, new.policy_version) == (0, version)
        for span, use in ((old, reference.use_base), (new, lambda: reference.use(adapter))):
            use()
            reference.check_tokens(PROMPT, Sampling(), rollout, span)
    await check(engine, reference, version=version)


async def test_each_adapter_replaces_the_previous_one(
    engine: Engine, reference: AdaptedReference, tmp_path: Path
) -> None:
    """Adapters of another rank, of fewer modules, and of all modules again."""
    for seed, rank, modules in (
        (2, 8, "all-linear"),
        (3, 4, "all-linear"),
        (4, 2, ["q_proj", "down_proj"]),
        (5, 8, "all-linear"),
    ):
        adapter = reference.write_adapter(tmp_path / str(seed), seed=seed, rank=rank, modules=modules)
        before = reference.logprobs(PROMPT, Sampling(), [70, 71, 72])
        reference.use(adapter)
        assert abs(reference.logprobs(PROMPT, Sampling(), [70, 71, 72]) - before).max() > 100 * TOLERANCE
        version = next(VERSIONS)
        await engine.update_adapter(adapter, version)
        await check(engine, reference, version=version)


async def test_aborting_update_ends_running_rollouts(
    engine: Engine, reference: AdaptedReference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (reference.write_adapter(tmp_path / str(seed), seed=seed) for seed in (6, 7))
    before, after = next(VERSIONS), next(VERSIONS)
    await engine.update_adapter(old, before)
    monkeypatch.setattr(engine, "config", engine.config.model_copy(update={"in_flight": "abort"}))  # type: ignore[attr-defined]
    running = await start_rollouts(engine)
    await engine.update_adapter(new, after)
    aborted = [rollout for rollout in await asyncio.gather(*running) if rollout.finish_reason == "abort"]
    assert aborted, "all rollouts finished before the adapter came"
    reference.use(old)
    for rollout in aborted:
        assert [span.policy_version for span in rollout.version_spans] == [before]
        reference.check(PROMPT, LONG, rollout, engine.info.feature_layer)


def drop_one(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors")


def add_one(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.lora_A.weight"] = torch.ones(MAX_RANK, 64)
    save_file(tensors, folder / "adapter_model.safetensors")


def change_the_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": MAX_RANK // 2}))


def remove_the_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("spoil", [drop_one, add_one, change_the_rank, remove_the_config, truncate])
async def test_adapter_that_does_not_fit_changes_nothing(
    engine: Engine, reference: AdaptedReference, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    served = reference.write_adapter(tmp_path / "served", seed=8)
    version = next(VERSIONS)
    await engine.update_adapter(served, version)
    spoilt = reference.write_adapter(tmp_path / "spoilt", seed=9)
    spoil(spoilt)
    with pytest.raises(InvalidRequest):
        await engine.update_adapter(spoilt, version + 1)
    assert engine.is_alive()
    reference.use(served)
    await check(engine, reference, version=version)


async def test_in_bfloat16_logprobs_are_pefts_own(folder: Path, reference: AdaptedReference, tmp_path: Path) -> None:
    """On the `torch` engine: vLLM has no usable bfloat16 on a CPU."""
    adapter = reference.write_adapter(tmp_path, seed=10)
    engine = make_engine("torch", folder, dtype="bfloat16")
    await engine.start()
    try:
        await engine.update_adapter(adapter, 1)
        rollout = await sample(engine, PROMPT, Sampling(max_tokens=20, seed=1))
    finally:
        await engine.stop()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    model = peft.PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()
    token_ids = rollout.token_ids.tolist()
    cache = transformers.DynamicCache()
    inputs, expected = PROMPT, []
    with torch.inference_mode():
        for token in token_ids:  # one token at a time: in bfloat16 the result depends on the shape of a product
            logits = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True).logits[0, -1]
            expected.append(float(torch.log_softmax(logits.float(), -1)[token]))
            inputs = [token]
    np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
