"""A model of about a million parameters, made on the spot: it speaks the format of the `digits` tasks, often wrongly.

It is trained on answers that are right with a probability that differs by skill and otherwise random, so that sampling
from it gives mixed difficulty: what reinforcement learning starts from.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from poise.orchestrator.tasks.digits import ALPHABET, ANSWER_TOKENS, SKILLS, draw

END = "<end>"

_RIGHT = {"copy": 0.7, "first": 0.6, "last": 0.5, "max": 0.4, "min": 0.4, "rev": 0.25, "inc": 0.2, "dec": 0.15}
"""How often a skill's answer is right in the training data."""

_STEPS, _BATCH, _LEARNING_RATE = 250, 160, 3e-3
_PROMPT_TOKENS = max(map(len, SKILLS)) + len(" 000=")
_LENGTH = _PROMPT_TOKENS + ANSWER_TOKENS


def make_tiny_model(folder: Path, seed: int = 0) -> None:
    """Train the model and write it, with its tokenizer, as a Hugging Face folder. Deterministic; about 25 s."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    _train(model, tokenizer, random.Random(seed))  # noqa: S311 (no secret)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate(ALPHABET)}
    vocabulary[END] = len(vocabulary)
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _train(
    model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, source: random.Random
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=_STEPS)
    model.train()
    for _ in range(_STEPS):
        rows, labels = zip(*(_example(tokenizer, source) for _ in range(_BATCH)), strict=True)
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


def _example(tokenizer: transformers.PreTrainedTokenizerFast, source: random.Random) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt with an answer, and the same with all but the answer masked."""
    skill, prompt, answer = draw(tuple(SKILLS), source)
    if source.random() > _RIGHT[skill]:
        answer = "".join(source.choice("0123456789") for _ in answer)
    prompt_ids, answer_ids = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_token_id]
    padding = _LENGTH - len(prompt_ids) - len(answer_ids)
    ids = [*prompt_ids, *answer_ids, *[tokenizer.eos_token_id] * padding]
    return ids, [*[-100] * len(prompt_ids), *answer_ids, *[-100] * padding]
