"""Settings of tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from poise.orchestrator.rewards.verifiers import BUILT_IN
from poise.orchestrator.tasks import digits, primer
from poise.orchestrator.tasks.rows import OnBadRow
from poise.runtime.config.settings import StrictModel
from poise.runtime.rpc.validation import IDENTIFIER

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def _known_skills(known: tuple[str, ...], skills: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := sorted(set(skills) - set(known)):
        raise ValueError(f"unknown skills {', '.join(unknown)}; known: {', '.join(known)}")
    if len(set(skills)) < len(skills):
        raise ValueError("a skill is listed twice; to draw one more often, add a second task with its own weight")
    return skills


def _primer_skills(skills: tuple[str, ...]) -> tuple[str, ...]:
    return _known_skills(tuple(primer.SKILLS), skills)


def _digit_skills(skills: tuple[str, ...]) -> tuple[str, ...]:
    return _known_skills(tuple(digits.SKILLS), skills)


def _verifier(name: str) -> str:
    if name in BUILT_IN or _IMPORT_PATH.fullmatch(name):
        return name
    raise ValueError(f"must be one of {', '.join(BUILT_IN)}, or an import path such as package.module:function")


def domain_problem(domain: str) -> str | None:
    """Return why a domain's name is invalid; None if it is valid."""
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
    """Share of the prompts, relative to the weights of the other tasks."""


class PrimerTask(_Task):
    """Elementary skills for a small instruct model: copying, letters, comparisons, small sums."""

    kind: Literal["primer"] = "primer"
    """This kind of task."""
    skills: Annotated[tuple[str, ...], AfterValidator(_primer_skills)] = Field(tuple(primer.SKILLS), min_length=1)
    """Skills to draw from, in equal shares."""
    one_shot: bool = True
    """Put one solved example of the skill before the question."""
    domain: Domain = "primer"
    """Domain of the problems."""


class DigitsTask(_Task):
    """Elementary skills on three digits, for the tiny character model."""

    kind: Literal["digits"] = "digits"
    """This kind of task."""
    skills: Annotated[tuple[str, ...], AfterValidator(_digit_skills)] = Field(tuple(digits.SKILLS), min_length=1)
    """Skills to draw from, in equal shares."""
    domain: Domain = "digits"
    """Domain of the problems."""


class JsonlTask(_Task):
    """Your own problems: a JSON Lines file of `{"prompt": text or messages, "answer": text or number, "domain"?,
    "metadata"?}`."""

    kind: Literal["jsonl"] = "jsonl"
    """This kind of task."""
    path: Path
    """UTF-8 file with one JSON object on each line."""
    verifier: Annotated[str, AfterValidator(_verifier)] = "exact"
    """`exact`, `numeric`, `regex` (the answer is the pattern), or `package.module:function`. The function is called as
    function(response, answer), with problem= and finish_reason= if it has these parameters, and returns a reward in
    [0, 1]."""
    domain: Domain = "default"
    """Domain of lines without one."""
    system: str | None = None
    """System message for prompts without one; a text prompt becomes the user's message. If unset, text prompts are
    passed to the model unchanged, without the chat template."""
    eval_path: Path | None = None
    """File of held-out problems. If unset, an eighth of `path` is held out."""
    max_prompts: int | None = Field(None, ge=1)
    """Maximum number of problems to read from the start of `path`; all if unset."""
    on_bad_row: OnBadRow | None = None
    """How to handle invalid rows: `stop` fails before the first step, `skip` leaves them out and reports their number.
    If unset, the run's `on_bad_row` applies."""


class GymTask(_Task):
    """A reasoning-gym task, generated and scored by that package."""

    kind: Literal["gym"] = "gym"
    """This kind of task."""
    name: str
    """Name of the task in reasoning-gym, such as `spell_backward`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the reasoning-gym task, such as `min_word_len`."""
    size: int = Field(10_000, ge=1, le=2**31)
    """Number of different problems to draw from."""
    domain: Domain | None = None
    """Domain of the problems; the task's name if unset."""
    system: str | None = None
    """System message; none if unset."""


TaskConfig = Annotated[PrimerTask | DigitsTask | JsonlTask | GymTask, Field(discriminator="kind")]
"""Settings of one task."""
