"""Elementary skills on three digits, for the tiny character-level model.

A prompt is a skill's name, three digits and an equals sign, such as `max482=` with the answer `8`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

SKILLS: dict[str, Callable[[str], str]] = {
    "fst": lambda digits: digits[0],
    "mid": lambda digits: digits[1],
    "lst": lambda digits: digits[2],
    "max": max,
    "min": min,
    "inc": lambda digits: str((int(digits[2]) + 1) % 10),
    "dec": lambda digits: str((int(digits[0]) - 1) % 10),
    "two": lambda digits: digits[:2],
    "rev": lambda digits: digits[2] + digits[1],
}
"""The function from digits to answer of each skill."""

ALPHABET = "".join(sorted({*"0123456789=", *"".join(SKILLS)}))
"""All characters of prompts and answers."""

PROMPT_CHARS = 7
MAX_ANSWER_CHARS = 2


def draw(skill: str, rng: Random) -> tuple[str, str]:
    """Return a prompt of the skill and its answer."""
    digits = f"{rng.randrange(1000):03d}"
    return f"{skill}{digits}=", SKILLS[skill](digits)
