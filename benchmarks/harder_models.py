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
from functools import partial
from pathlib import Path
from random import Random

from poise.local.models.tiny import make_character_model
from poise.orchestrator.tasks.digits import MAX_ANSWER_CHARS, PROMPT_CHARS, SKILLS

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

_CLEAN_LISTS, _NOISY_LISTS, _CLEAN_SKILLS, _WRONG_SKILLS = 500, 100, 250, 200
"""Training steps of both phases of both models."""


def make_lists_model(folder: Path, data: Path) -> None:
    """Train the model, and write its problems."""
    num_steps = _CLEAN_LISTS + _NOISY_LISTS
    progress = partial(_print_progress, folder.name, num_steps)
    length = 4 + 2 * LIST_DIGITS + 1
    make_character_model(folder, ALPHABET, _draw_list, num_steps=num_steps, length=length, on_step=progress)
    random = Random(1)
    with data.open("w") as file:
        for _ in range(NUM_PROMPTS):
            skill = random.choice(list(LISTS))
            digits = "".join(random.choices("0123456789", k=LIST_DIGITS))
            file.write(json.dumps({"prompt": f"{skill}{digits}=", "answer": LISTS[skill](digits)}) + "\n")


def make_wrong_model(folder: Path) -> None:
    """Train the model."""
    num_steps = _CLEAN_SKILLS + _WRONG_SKILLS
    progress = partial(_print_progress, folder.name, num_steps)
    length = PROMPT_CHARS + MAX_ANSWER_CHARS + 1
    make_character_model(folder, ALPHABET, _draw_wrong, num_steps=num_steps, length=length, on_step=progress)


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


def _draw_list(random: Random, step: int) -> tuple[str, str]:
    skill = random.choice(list(LISTS))
    digits = "".join(random.choices("0123456789", k=LIST_DIGITS))
    answer = LISTS[skill](digits)
    if step >= _CLEAN_LISTS:
        answer = "".join(random.choice("0123456789") if random.random() < _ERRORS[skill] else c for c in answer)
    return f"{skill}{digits}=", answer


def _draw_wrong(random: Random, step: int) -> tuple[str, str]:
    skills = list(SKILLS)
    skill = random.choice(skills)
    digits = f"{random.randrange(1000):03d}"
    answer, kind = SKILLS[skill](digits), random.random()
    is_second = step >= _CLEAN_SKILLS
    if is_second and kind < _WRONG_SHARE:
        answer = SKILLS[skills[(skills.index(skill) + 1) % len(skills)]](digits)
    elif is_second and kind < _WRONG_SHARE + _RANDOM_SHARE:
        answer = "".join(random.choice("0123456789") for _ in answer)
    return f"{skill}{digits}=", answer


def _print_progress(name: str, num_steps: int, step: int, loss: float) -> None:
    if step % 100 == 99:
        print(f"{name}: step {step + 1} of {num_steps}, loss {loss:.3f}", flush=True)
