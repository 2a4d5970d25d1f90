"""The settings in compare.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from itertools import chain
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
    """Budget of each run: exactly one of these. A run ends after the step that reaches it."""

    tokens: int | None = Field(None, ge=1)
    """Response tokens sampled for training, also in groups that an algorithm drops."""
    wall_s: float | None = Field(None, gt=0)
    """Seconds of training, without evaluations."""
    updates: int | None = Field(None, ge=1)
    """Steps."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.limit) != 1:
            raise ValueError("set exactly one of tokens, wall_s and updates")
        return self

    @property
    def limit(self) -> dict[str, float]:
        """The limit that is set, by name."""
        return self.model_dump(exclude_none=True)


class RunEntry(StrictModel):
    """An algorithm and its settings."""

    algorithm: str | dict[str, Any]
    """Name of the algorithm, or its `kind` and options, as `train.algorithm` of a run."""
    set: dict[str, Any] = Field({})
    """Further settings by their path in run.yaml, such as `train.rollouts_per_prompt: 8`."""
    seeds: tuple[Seed, ...] | None = Field(None, min_length=1)
    """Seeds of this run; null means those of the comparison."""


class CompareFile(StrictModel):
    """The content of compare.yaml."""

    name: Name
    """Name of the comparison."""
    dir: Path | None = None
    """Folder of the comparison; null means compare/<name>."""
    base: str = Field(min_length=1)
    """Settings of all runs: a preset's name, or the path of a run.yaml relative to this file."""
    set: dict[str, Any] = Field({})
    """Settings of all runs by their path in run.yaml, in place of the base's, such as `train.evaluation.num_prompts:
    64`. A run's own `set` overrides them."""
    budget: BudgetSection
    """Budget of each run."""
    num_evaluations: int = Field(8, ge=0, le=1000)
    """Held-out evaluations during training, besides those before and after. They are the points of the curves."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    """Every run is trained once with each seed. `seeds` of a run replaces them."""
    levels: tuple[float, ...] = ()
    """Held-out rewards for the time-to-reward table; empty chooses five that every run reaches."""
    reference: str | None = None
    """Run that ratios are relative to; null means the first."""
    keep_state: bool = False
    """Keep the services' state of a finished run: optimizer, probe and queue. Results and model are always kept."""
    runs: dict[Name, RunEntry] = Field(min_length=1)
    """The runs to compare, by names of your choice."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for path, seeds in self._seeds_by_path():
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{path}: one is listed twice")
        if self.reference is not None and self.reference not in self.runs:
            raise ValueError(f"reference: {self.reference!r} is not a run; runs: {', '.join(self.runs)}")
        return self

    def _seeds_by_path(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "seeds", self.seeds
        for name, run in self.runs.items():
            yield f"runs.{name}.seeds", run.seeds or ()

    @property
    def schedule(self) -> list[tuple[int, str]]:
        """Seed and name of every run, seed by seed, so that finished runs are comparable at any time."""
        by_name = {name: self.seeds if run.seeds is None else run.seeds for name, run in self.runs.items()}
        all_seeds = dict.fromkeys(chain(self.seeds, *by_name.values()))
        return [(seed, name) for seed in all_seeds for name, seeds in by_name.items() if seed in seeds]

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""
        return (self.dir or Path("compare") / self.name).expanduser().resolve()

    @property
    def reference_name(self) -> str:
        """Name of the run that ratios are relative to."""
        return self.reference or next(iter(self.runs))


def read_compare_file(path: Path) -> CompareFile:
    """Read compare.yaml.

    Raises:
        ConfigError: names every problem, with its path and the remedy.
    """
    try:
        return CompareFile(**read_yaml(path))
    except ValidationError as error:
        lines = (f"{path}: {dotted(where)}: {text}" for where, text in problems_in(error, CompareFile))
        raise ConfigError("\n".join(lines)) from None


def example_text() -> str:
    """Return a compare.yaml that works as it is, with every setting explained."""
    return (resources.files(__package__) / "example.yaml").read_text(encoding="utf-8").rstrip()
