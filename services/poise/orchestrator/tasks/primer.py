"""Elementary skills for a small instruct model, of medium difficulty.

Do not change the wording: success rates depend on every letter. The solved example of a skill is always the same, so
that a prompt identifies its question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Message

SYSTEM = "Answer."
"""The system message."""

_WORDS = (  # noqa: SIM905 (59 lines otherwise)
    "apple river table green house music stone light paper chair dream ocean horse bread cloud sugar tiger plant "
    "queen glass winter garden summer silver window bridge forest button candle dragon pencil rabbit basket "
    "market flower island camera guitar yellow orange purple planet rocket castle pirate doctor turtle monkey "
    "kitten puppy lemon melon peach olive onion pepper carrot potato tomato "
).split()

_EXAMPLE_SEED = 100


def _copy(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(_WORDS)
    return f"Repeat this word: {word}", word


def _capitals(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(_WORDS)
    return f"Write this word in capital letters: {word}", word.upper()


def _first_letter(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(_WORDS)
    return f'What is the first letter of the word "{word}"?', word[0]


def _last_letter(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(_WORDS)
    return f'What is the last letter of the word "{word}"?', word[-1]


def _next_number(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1, 200)
    return f"What number comes after {number}?", str(number + 1)


def _larger(rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample(range(1, 100), 2)
    return f"Which number is larger, {one} or {other}?", str(max(one, other))


def _smaller(rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample(range(1, 100), 2)
    return f"Which number is smaller, {one} or {other}?", str(min(one, other))


def _greater(rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample(range(1, 100), 2)
    return f"Is {one} greater than {other}? Answer yes or no.", "yes" if one > other else "no"


def _odd_or_even(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1, 99)
    return f"Is {number} odd or even?", "odd" if number % 2 else "even"


def _first_word(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, 3)
    return f"What is the first word in this list: {', '.join(words)}?", words[0]


def _last_word(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, 3)
    return f"What is the last word in this list: {', '.join(words)}?", words[-1]


def _subtract(rng: random.Random) -> tuple[str, str]:
    minuend = rng.randint(2, 18)
    subtrahend = rng.randint(1, min(9, minuend))
    return f"What is {minuend} - {subtrahend}?", str(minuend - subtrahend)


SKILLS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy,
    "capitals": _capitals,
    "first_letter": _first_letter,
    "last_letter": _last_letter,
    "next_number": _next_number,
    "larger": _larger,
    "smaller": _smaller,
    "greater": _greater,
    "odd_or_even": _odd_or_even,
    "first_word": _first_word,
    "last_word": _last_word,
    "subtract": _subtract,
}
"""Draws the question and the answer of each skill."""


def draw(skills: Sequence[str], one_shot: bool, domain: str, rng: random.Random) -> Problem:
    """Return a problem of one of `skills` that differs from the skill's example."""
    skill = rng.choice(skills)
    example, solution = SKILLS[skill](random.Random(_EXAMPLE_SEED))  # noqa: S311 (no secret)
    while True:
        question, answer = SKILLS[skill](rng)
        if question != example:
            break
    prompt = [Message(role="system", content=SYSTEM)]
    if one_shot:
        prompt += [Message(role="user", content=example), Message(role="assistant", content=solution)]
    prompt.append(Message(role="user", content=question))
    return Problem(domain, prompt, answer, "exact", {"skill": skill})
