"""Models small enough to be made in a second, that transformers and vLLM load alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("<think>", "</think>", "<answer>", "</answer>", "</thi", "nk>")
"""Tokens of several characters, so that a random model writes tags whole and in halves."""

SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_llama(folder: Path, *, seed: int = 0, max_position_embeddings: int = 512) -> Path:
    """Write a random float32 Llama (width 64, 4 layers, tied head) with a byte-level tokenizer; return its folder."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's attention takes
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=0.15,  # enough for the next token to depend on the last ones
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_qwen2(folder: Path) -> Path:
    """Write a random float32 Qwen2 (width 64, 4 layers) with biases and a head of its own; return its folder."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # Qwen2 begins with zeros, which no update would change
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer with a few words, special tokens and a chat template."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(list(WORDS))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIALS[0], additional_special_tokens=list(SPECIALS[1:])
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
