"""compare.yaml: what is compared. Owns its settings and nothing of how runs are made of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from poise.runtime.config.load import read_yaml
from poise.runtime.config.settings import ConfigError, StrictModel
from poise.runtime.config.text import dotted, problems_in

_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,47}$"
Name = Annotated[str, StringConstraints(pattern=_NAME)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class BudgetSection(StrictModel):
    """What each run may spend: exactly one of these. A run ends after the step that reaches it."""

    tokens: int | None = Field(None, ge=1)
    """Response tokens sampled for training, those of groups that an algorithm drops among them."""
    wall_s: float | None = Field(None, gt=0)
    """Seconds of training; evaluations do not count."""
    updates: int | None = Field(None, ge=1)
    """Steps."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.given) != 1:
            raise ValueError("give exactly one of tokens, wall_s and updates")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The one that is set, by name."""
        return self.model_dump(exclude_none=True)


class RunEntry(StrictModel):
    """One way to train."""

    algorithm: str | dict[str, Any]
    """As `train.algorithm` of a run: its name, or its name as `kind` and its options."""
    set: dict[str, Any] = Field({})
    """Settings of its own, by their path in run.yaml, such as `train.rollouts_per_prompt: 8`."""


class CompareFile(StrictModel):
    """What compare.yaml holds."""

    name: Name
    """Names the comparison."""
    dir: Path | None = None
    """Its folder; null means compare/<name>."""
    base: str = Field(min_length=1)
    """What all runs have in common: a preset's name, or the path of a run.yaml, from the folder of this file."""
    budget: BudgetSection
    """What each run may spend."""
    num_evaluations: int = Field(8, ge=0, le=1000)
    """Held-out evaluations between the one before and the one after training: the points of the curves."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    """Each run is made once with each."""
    levels: tuple[float, ...] = ()
    """Held-out rewards that are to be reached; empty chooses five that every run reaches."""
    reference: str | None = None
    """The run that ratios are against; null is the first."""
    keep_state: bool = False
    """Keep the services' state of a finished run, its optimizer and queue. Its results and model always stay."""
    runs: dict[Name, RunEntry] = Field(min_length=1)
    """What is compared, by names of your choice."""

    @model_validator(mode="after")
    def _names_hold(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        if self.reference is not None and self.reference not in self.runs:
            raise ValueError(f"reference: {self.reference!r} is none of the runs: {', '.join(self.runs)}")
        return self

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return (self.dir or Path("compare") / self.name).expanduser().resolve()

    @property
    def reference_name(self) -> str:
        """The run that ratios are against."""
        return self.reference or next(iter(self.runs))


def read_compare_file(path: Path) -> CompareFile:
    """Read compare.yaml.

    Raises:
        ConfigError: anything wrong with it, with the field's path and the remedy.
    """
    try:
        return CompareFile(**read_yaml(path))
    except ValidationError as error:
        lines = (f"{path}: {dotted(where)}: {text}" for where, text in problems_in(error, CompareFile))
        raise ConfigError("\n".join(lines)) from None


def example_text() -> str:
    """Return a compare.yaml that can be run, with every setting explained."""
    return (resources.files(__package__) / "example.yaml").read_text(encoding="utf-8").rstrip()
