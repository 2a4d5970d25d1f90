"""The settings of tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from poise.orchestrator.tasks import digits, primer
from poise.orchestrator.tasks.rows import OnBadRow
from poise.runtime.config.settings import StrictModel
from poise.runtime.rpc.validation import IDENTIFIER

VERIFIERS = ("exact", "numeric", "regex")
"""Verifiers by name; any other is an import path."""

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def _known_skills(known: tuple[str, ...], skills: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := sorted(set(skills) - set(known)):
        raise ValueError(f"unknown skills {', '.join(unknown)}; known: {', '.join(known)}")
    if len(set(skills)) < len(skills):
        raise ValueError("names a skill twice; use weights of tasks to have more of one")
    return skills


def _primer_skills(skills: tuple[str, ...]) -> tuple[str, ...]:
    return _known_skills(tuple(primer.SKILLS), skills)


def _digit_skills(skills: tuple[str, ...]) -> tuple[str, ...]:
    return _known_skills(tuple(digits.SKILLS), skills)


def _verifier(name: str) -> str:
    if name in VERIFIERS or _IMPORT_PATH.fullmatch(name):
        return name
    raise ValueError(f"must be one of {', '.join(VERIFIERS)}, or an import path such as package.module:function")


def domain_problem(domain: str) -> str | None:
    """Return what is wrong with a domain's name; None where nothing is."""
    if IDENTIFIER.fullmatch(domain):
        return None
    return "must be 1 to 128 characters of A-Z a-z 0-9 . _ : / -"


def _domain(domain: str) -> str:
    if problem := domain_problem(domain):
        raise ValueError(problem)
    return domain


Domain = Annotated[str, AfterValidator(_domain)]


class _Task(StrictModel):
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Share of the prompts, relative to the other tasks' weights."""


class PrimerTask(_Task):
    """Elementary skills for a small instruct model: copying, letters, comparing, small sums."""

    kind: Literal["primer"] = "primer"
    """This kind of task."""
    skills: Annotated[tuple[str, ...], AfterValidator(_primer_skills)] = Field(tuple(primer.SKILLS), min_length=1)
    """Which skills, in equal shares."""
    one_shot: bool = True
    """Show one solved example of the skill before the question."""
    domain: Domain = "primer"
    """Whose probe values the rollouts."""


class DigitsTask(_Task):
    """Elementary skills on three digits, for the tiny character model."""

    kind: Literal["digits"] = "digits"
    """This kind of task."""
    skills: Annotated[tuple[str, ...], AfterValidator(_digit_skills)] = Field(tuple(digits.SKILLS), min_length=1)
    """Which skills, in equal shares."""
    domain: Domain = "digits"
    """Whose probe values the rollouts."""


class JsonlTask(_Task):
    """Your own problems: a file of `{"prompt": text or messages, "answer": text or number, "domain"?, "metadata"?}`."""

    kind: Literal["jsonl"] = "jsonl"
    """This kind of task."""
    path: Path
    """UTF-8 file, one JSON object a line."""
    verifier: Annotated[str, AfterValidator(_verifier)] = "exact"
    """`exact`, `numeric`, `regex` (the answer is the pattern), or `package.module:function`, called as
    function(response, answer) and, where it takes it, problem=Problem; it returns a reward in [0, 1]."""
    domain: Domain = "default"
    """Whose probe values the rollouts, where a line does not say."""
    system: str | None = None
    """System message put before prompts that bring none; a prompt that is text becomes the user's message. Unset, text
    reaches the model as it stands."""
    eval_path: Path | None = None
    """File of held-out problems. Unset, an eighth of `path` is held out."""
    max_prompts: int | None = Field(None, ge=1)
    """Read so many problems from the top of `path`; unset reads all."""
    on_bad_row: OnBadRow | None = None
    """What rows that cannot be used do: `stop` the run before its first step, or `skip`: the run goes without them, and
    says how many there are. Unset takes `on_bad_row` of the run."""


class GymTask(_Task):
    """A reasoning-gym task, generated and scored by that package."""

    kind: Literal["gym"] = "gym"
    """This kind of task."""
    name: str
    """Name of the task in reasoning-gym, such as `spell_backward`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its own settings, such as `min_word_len`."""
    size: int = Field(10_000, ge=1, le=2**31)
    """Problems to draw from."""
    domain: Domain | None = None
    """Whose probe values the rollouts; unset is the task's name."""
    system: str | None = None
    """System message; unset, there is none."""


TaskConfig = Annotated[PrimerTask | DigitsTask | JsonlTask | GymTask, Field(discriminator="kind")]
"""Settings of one task of a mixture."""
