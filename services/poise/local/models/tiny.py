"""Train a model of about a million parameters that solves the `digits` tasks imperfectly.

It first learns correct answers, then partly random ones, at a different rate for each skill. Problems then have mixed
difficulty, which reinforcement learning needs.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from poise.orchestrator.tasks.digits import ALPHABET, MAX_ANSWER_CHARS, PROMPT_CHARS, SKILLS, draw

END = "<end>"

_CORRECT_SHARE = {
    "fst": 0.9,
    "mid": 0.75,
    "lst": 0.6,
    "max": 0.45,
    "min": 0.35,
    "inc": 0.25,
    "dec": 0.2,
    "two": 0.15,
    "rev": 0.1,
}
"""Share of correct answers of each skill in the second phase."""

_CLEAN_STEPS, _NOISY_STEPS, _BATCH, _LEARNING_RATE = 250, 80, 64, 3e-3
_LENGTH = PROMPT_CHARS + MAX_ANSWER_CHARS + 1


def make_tiny_model(folder: Path, seed: int = 0) -> None:
    """Train the model and write it, with its tokenizer, as a Hugging Face folder. About 30 s."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny matrices: more threads wait for each other
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
    _train(model, tokenizer, Random(seed))  # noqa: S311 (not a secret)
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
    model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, source: Random
) -> None:
    num_steps = _CLEAN_STEPS + _NOISY_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    model.train()
    for step in range(num_steps):
        examples = [_example(tokenizer, source, noisy=step >= _CLEAN_STEPS) for _ in range(_BATCH)]
        rows, labels = zip(*examples, strict=True)
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _example(
    tokenizer: transformers.PreTrainedTokenizerFast, source: Random, *, noisy: bool
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt with an answer, and the labels: the same ids with only the answer unmasked."""
    skill = source.choice(list(SKILLS))
    prompt, answer = draw(skill, source)
    if noisy and source.random() > _CORRECT_SHARE[skill]:
        answer = "".join(source.choice("0123456789") for _ in answer)
    ids = [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]
    padding = _LENGTH - len(ids)
    masked = [-100] * PROMPT_CHARS
    return [*ids, *[tokenizer.eos_token_id] * padding], [*masked, *ids[PROMPT_CHARS:], *[-100] * padding]
