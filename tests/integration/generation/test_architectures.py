"""The log-probabilities of the `torch` engine against each architecture's own forward in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.support.architectures import make_architecture

from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineRequest
from poise.generation.engines.transformers.engine import TorchEngine
from poise_client.types import Rollout, RolloutId, Sampling

CACHED = [
    "bloom",
    "falcon_h1",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "granite",
    "lfm2",
    "llama4_text",
    "mistral",
    "mpt",
    "qwen3_next",
]
UNCACHED = ["bamba", "mamba", "openai-gpt", "recurrent_gemma"]
TEMPERATURE = 0.7


async def sample(folder: Path) -> tuple[list[int], Rollout, int]:
    engine = TorchEngine(GenerationConfig(model=str(folder), engine="torch"))
    await engine.start()
    try:
        ids = engine.tokenize("12+3=")
        sampling = Sampling(max_tokens=24, temperature=TEMPERATURE, seed=1)
        rollout = await engine.generate(EngineRequest(RolloutId("run", 0, "g", 0), ids, sampling))
        return ids, rollout, engine.info.max_model_len
    finally:
        await engine.stop()


def own_logprobs(folder: Path, ids: list[int], rollout: Rollout) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the other implementations ignore the cap
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *rollout.token_ids]]), use_cache=False).logits[0, len(ids) - 1 : -1]
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", [*CACHED, *UNCACHED])
async def test_logprobs_are_the_models_own(name, tmp_path, caplog):
    folder = make_architecture(tmp_path, name)
    ids, rollout, _ = await sample(folder)
    np.testing.assert_allclose(rollout.logprobs, own_logprobs(folder, ids, rollout), rtol=0, atol=5e-4)
    assert ("without a KV cache" in caplog.text) == (name in UNCACHED)


@pytest.mark.parametrize(("name", "limit"), [("bloom", 8192), ("mamba", 8192), ("mpt", 256), ("gpt2", 256)])
async def test_length_limit_is_the_models_or_the_default(name, limit, tmp_path):
    folder = make_architecture(tmp_path, name)
    _, _, found = await sample(folder)
    assert found == limit
