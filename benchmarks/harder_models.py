"""Small models and data for `compare_harder.py`. Everything follows from a seed.

- `lists`: a model of about a million parameters that has learnt to copy, shift and swap lists of 16 digits imperfectly,
  so that responses of 17 tokens are exact in a fifth to two thirds of the cases.
- `wrong`: the tiny preset's skills with confidently wrong answers: the model first learns the answer of another skill
  nine times out of ten, and the correct one rarely.
- `words.jsonl`: lists of numbers for SmolLM2 to repeat, reverse and sort.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from poise.orchestrator.tasks.digits import MAX_ANSWER_CHARS, PROMPT_CHARS, SKILLS

END = "<end>"
ALPHABET = "".join(sorted({*"0123456789=", *"abcdefghijklmnopqrstuvwxyz"}))
LIST_DIGITS = 16
NUM_PROMPTS = 20_000

LISTS: dict[str, Callable[[str], str]] = {
    "cpy": lambda digits: digits,
    "inc": lambda digits: "".join(str((int(digit) + 1) % 10) for digit in digits),
    "swp": lambda digits: "".join(digits[i + 1] + digits[i] for i in range(0, len(digits), 2)),
}
"""The function from digits to answer of each skill."""
_ERRORS = {"cpy": 0.04, "inc": 0.08, "swp": 0.12}
"""Share of wrong digits of each skill in the second phase."""

_WRONG_SHARE, _RANDOM_SHARE = 0.9, 0.04

Draw = Callable[[Random, bool], tuple[str, str]]
"""Returns a prompt and the answer to learn, in the first phase or, if True, in the second."""


def make_lists_model(folder: Path, data: Path) -> None:
    """Train the model, and write its problems."""
    _train(folder, _draw_list, num_clean=500, num_second=100, length=4 + 2 * LIST_DIGITS + 1)
    random = Random(1)
    with data.open("w") as file:
        for _ in range(NUM_PROMPTS):
            skill = random.choice(list(LISTS))
            digits = "".join(random.choices("0123456789", k=LIST_DIGITS))
            file.write(json.dumps({"prompt": f"{skill}{digits}=", "answer": LISTS[skill](digits)}) + "\n")


def make_wrong_model(folder: Path) -> None:
    """Train the model."""
    _train(folder, _draw_wrong, num_clean=250, num_second=200, length=PROMPT_CHARS + MAX_ANSWER_CHARS + 1)


def make_words(data: Path) -> None:
    """Write problems for SmolLM2: lists of eight numbers."""
    random = Random(2)
    tasks: dict[str, Callable[[list[int]], list[int]]] = {
        "Repeat this list": list,
        "Reverse this list": lambda numbers: numbers[::-1],
        "Sort this list": sorted,
    }
    with data.open("w") as file:
        for _ in range(NUM_PROMPTS):
            task = random.choice(list(tasks))
            example, question = ([random.randint(1, 9) for _ in range(8)] for _ in range(2))
            prompt = [
                {"role": "system", "content": "Answer with the list only."},
                {"role": "user", "content": f"{task}: {_text(example)}"},
                {"role": "assistant", "content": _text(tasks[task](example))},
                {"role": "user", "content": f"{task}: {_text(question)}"},
            ]
            file.write(json.dumps({"prompt": prompt, "answer": _text(tasks[task](question))}) + "\n")


def _text(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _draw_list(random: Random, second: bool) -> tuple[str, str]:
    skill = random.choice(list(LISTS))
    digits = "".join(random.choices("0123456789", k=LIST_DIGITS))
    answer = LISTS[skill](digits)
    if second:
        answer = "".join(random.choice("0123456789") if random.random() < _ERRORS[skill] else c for c in answer)
    return f"{skill}{digits}=", answer


def _draw_wrong(random: Random, second: bool) -> tuple[str, str]:
    skills = list(SKILLS)
    skill = random.choice(skills)
    digits = f"{random.randrange(1000):03d}"
    answer, kind = SKILLS[skill](digits), random.random()
    if second and kind < _WRONG_SHARE:
        answer = SKILLS[skills[(skills.index(skill) + 1) % len(skills)]](digits)
    elif second and kind < _WRONG_SHARE + _RANDOM_SHARE:
        answer = "".join(random.choice("0123456789") for _ in answer)
    return f"{skill}{digits}=", answer


def _train(folder: Path, draw: Draw, num_clean: int, num_second: int, length: int) -> None:
    """Train a model like the tiny preset's, and write it as a Hugging Face folder."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random, tokenizer = Random(0), _tokenizer()
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
    num_steps, rate = num_clean + num_second, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps, pct_start=0.1)
    model.train()
    for step in range(num_steps):
        examples = [_example(tokenizer, *draw(random, step >= num_clean), length) for _ in range(64)]
        rows, labels = zip(*examples, strict=True)
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{folder.name}: step {step + 1} of {num_steps}, loss {loss.item():.3f}", flush=True)
    model.eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate([*ALPHABET, END])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _example(
    tokenizer: transformers.PreTrainedTokenizerFast, prompt: str, answer: str, length: int
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt with an answer, and the labels: the same ids with only the answer unmasked."""
    ids = [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]
    padding = length + 1 - len(ids)
    masked = [-100] * len(prompt)
    return [*ids, *[tokenizer.eos_token_id] * padding], [*masked, *ids[len(prompt) :], *[-100] * padding]
