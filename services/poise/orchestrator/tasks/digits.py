"""Elementary skills on three digits, for a model small enough to be made on the spot.

A prompt is the skill's name, three digits and an equals sign, such as `rev 482=`; the answer is `284`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda digits: digits,
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[-1],
    "max": lambda digits: max(digits),
    "min": lambda digits: min(digits),
    "rev": lambda digits: digits[::-1],
    "inc": lambda digits: "".join(str((int(digit) + 1) % 10) for digit in digits),
    "dec": lambda digits: "".join(str((int(digit) - 1) % 10) for digit in digits),
}
"""The answer of each skill."""

ALPHABET = "".join(sorted({*"0123456789= ", *"".join(SKILLS)}))
"""Every character of prompts and answers."""

ANSWER_TOKENS = 4
"""Characters of the longest answer, and its end."""


def draw(skills: tuple[str, ...], random_source: random.Random) -> tuple[str, str, str]:
    """Return (skill, prompt, answer)."""
    skill = random_source.choice(skills)
    digits = f"{random_source.randrange(1000):03d}"
    return skill, f"{skill} {digits}=", SKILLS[skill](digits)
