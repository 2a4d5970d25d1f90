"""Train a model of about a million parameters that solves the `digits` tasks imperfectly.

It first learns correct answers, then partly random ones, at a different rate for each skill. Problems then have mixed
difficulty, which reinforcement learning needs.
"""

from __future__ import annotations

from collections.abc import Callable
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

Draw = Callable[[Random, int], tuple[str, str]]
"""Returns the prompt and the answer of an example, for a training step."""


def make_tiny_model(folder: Path, seed: int = 0) -> None:
    """Train the model and write it, with its tokenizer, as a Hugging Face folder. About 30 s."""
    length = PROMPT_CHARS + MAX_ANSWER_CHARS + 1
    make_character_model(folder, ALPHABET, _draw, num_steps=_CLEAN_STEPS + _NOISY_STEPS, length=length, seed=seed)


def make_character_model(
    folder: Path,
    alphabet: str,
    draw_example: Draw,
    *,
    num_steps: int,
    length: int,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a model with one token per character to answer prompts, and write it as a Hugging Face folder.

    Args:
        folder: where to write the model and its tokenizer.
        alphabet: characters of prompts and answers.
        draw_example: draws the examples.
        num_steps: steps of 64 examples.
        length: maximum characters of an example, with one for its end.
        seed: determines the weights and the examples.
        on_step: called after each step with its number and loss.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny matrices: more threads wait for each other
    torch.manual_seed(seed)
    tokenizer = _tokenizer(alphabet)
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
    source = Random(seed)  # noqa: S311 (not a secret)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    model.train()
    for step in range(num_steps):
        examples = [_example(tokenizer, *draw_example(source, step), length) for _ in range(_BATCH)]
        rows, labels = zip(*examples, strict=True)
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, loss.item())
    model.eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(alphabet: str) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary[END] = len(vocabulary)
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _draw(source: Random, step: int) -> tuple[str, str]:
    skill = source.choice(list(SKILLS))
    prompt, answer = draw(skill, source)
    if step >= _CLEAN_STEPS and source.random() > _CORRECT_SHARE[skill]:
        answer = "".join(source.choice("0123456789") for _ in answer)
    return prompt, answer


def _example(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: str, answer: str, length: int
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt with an answer, and the labels: the same ids with only the answer unmasked."""
    ids = [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]
    padding = length - len(ids)
    masked = [-100] * len(prompt)
    return [*ids, *[tokenizer.eos_token_id] * padding], [*masked, *ids[len(prompt) :], *[-100] * padding]
