"""Tiny random models of many architectures of transformers, peaked enough for every part of them to matter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.support.tiny_models import make_tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.3,
}
"""Given to every configuration that has a field of the name."""

_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
_ROTARY_GPT = _GPT2 | {"rotary_dim": 4}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_WINDOW = {"sliding_window": 8}
_MAMBA_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}

_OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_HYBRID,
    "bloom": {"n_layer": 4, "n_head": 4},
    "codegen": _ROTARY_GPT | {"n_ctx": 256},
    "cohere": {"logit_scale": 0.3},
    "cohere2": _WINDOW | {"logit_scale": 0.3},
    "deepseek_v2": _LATENT | {"topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "exaone4": _WINDOW,
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "falcon_h1": _MAMBA_HYBRID | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "gemma2": _WINDOW | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 8},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_oss": _WINDOW,
    "gptj": _ROTARY_GPT,
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "jamba": {"mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2": {"block_ff_dim": 64, "full_attn_idxs": [1, 3]},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 64},
    "mamba": {"state_size": 4, "n_layer": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "minicpm3": _LATENT,
    "mistral": _WINDOW,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 256},
    "olmo3": _WINDOW,
    "openai-gpt": _GPT2,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi3": _WINDOW,
    "qwen2": _WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "starcoder2": _WINDOW,
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
}
"""What architectures need besides, by `model_type`."""


PACKED = [
    "afmoe",
    "apertus",
    "arcee",
    "biogpt",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "minicpm3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "nanochat",
    "olmo2",
    "olmo3",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
    "vaultgemma",
]
"""Architectures whose siblings the learner computes in one row."""

ALONE = [
    "bamba",
    "bloom",
    "codegen",
    "falcon",
    "falcon_h1",
    "gpt_neo",
    "gptj",
    "jamba",
    "lfm2",
    "llama4_text",
    "mamba",
    "mamba2",
    "minimax",
    "mpt",
    "nemotron",
    "openai-gpt",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "stablelm",
    "xglm",
    "xlstm",
]
"""Those whose sequences it computes one at a time: attention of their own, recurrence, or a decoder that drops what
packed attention needs."""


def make_architecture(folder: Path, model_type: str, **changes: Any) -> Path:
    """Write a random float32 model of an architecture with a byte-level tokenizer; return its folder."""
    tokenizer = make_tokenizer()
    cls = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    given = {name: value for name, value in (_COMMON | _OWN.get(model_type, {})).items() if name in known} | changes
    config = cls(
        **given, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0, bos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and not parameter.any():  # zeros, which no test would miss
                    parameter.normal_(0, 0.2)
                elif parameter.dim() == 1 and bool((parameter == 1).all()):
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
