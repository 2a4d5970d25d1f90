"""Resolve compare.yaml to runs, and check all of them before the first one starts.

A run that has started keeps its settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from poise.local.comparison.file import CompareFile, RunEntry
from poise.local.run_file import LocalRun, load_run, preset_names, preset_path
from poise.local.run_settings import PROGRAMS
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise.runtime.config.load import read_yaml
from poise.runtime.config.settings import ConfigError
from poise.runtime.config.text import redacted

_UNLIMITED_STEPS = 10**9
"""More steps than any budget of tokens or seconds allows."""

COMMON_DEFAULTS: Mapping[str, Any] = {"learner.measure_gradient_variance": True}
"""Settings of all runs, by path, unless the base or a run's `set` has another value."""

_NOT_IN_SET = {
    "run": "each run has its own name and folder",
    "train.algorithm": "set `algorithm` of the run",
    "train.num_steps": "set `budget`",
    "train.budget": "set `budget`",
    "train.evaluation": "all runs are evaluated alike; use the `set` of all runs, and `num_evaluations`",
    "train.tasks": "all runs are evaluated on the same prompts; use the `set` of all runs",
    "seed": "set `seeds`",
}
"""Settings that a run's `set` may not contain, each with the remedy."""

_NOT_IN_COMMON_SET = ("run", "train.algorithm", "train.num_steps", "train.budget", "seed")
"""Settings that the `set` of all runs may not contain."""

_NOT_LEARNING = frozenset(
    {
        *(
            f"{program}.{section}"
            for program in PROGRAMS
            for section in ("grpc", "admin", "auth", "logging", "tracing")
        ),
        *("generation.model", "learner.model", "learner.state_dir", "learner.export_dir", "learner.replicas"),
        *("learner.replica_token_file", "learner.replica_ca_file"),
        *("value.state_dir", "value.queue.url", "train.run_dir", "train.endpoints", "train.samples_per_step"),
    }
)
"""Settings of addresses, folders and output. They do not change what a run learns."""


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs of a comparison."""

    name: str
    seed: int
    algorithm: str
    local: LocalRun

    @property
    def label(self) -> str:
        """Name of the run with its seed."""
        return self.local.name

    @property
    def record(self) -> Path:
        """File with the settings of its first start."""
        return self.local.dir / "compare.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that affects training, by path."""
        trees = {program: redacted(getattr(self.local, program)) for program in PROGRAMS}
        return {"model": self.local.model} | dict(_leaves(trees))


@dataclass(frozen=True)
class Plan:
    """A comparison, resolved and checked."""

    file: CompareFile
    base: Path
    runs: tuple[PlannedRun, ...]
    """In order of execution: seed by seed, so that finished runs are comparable at any time."""

    @property
    def dir(self) -> Path:
        """The comparison's folder."""
        return self.file.folder

    def reload(self, run: PlannedRun) -> PlannedRun:
        """Return a run with its current ports, after they have changed."""
        return _plan_run(self.file, self.base, run.name, self.file.runs[run.name], run.seed)


def make_plan(file: CompareFile, source: Path) -> Plan:
    """Resolve the settings of every run. `source` is the path of `file`.

    Raises:
        ConfigError: names the problems of all runs.
    """
    base = _base_path(file.base, source)
    try:
        _reject_reserved(file.set, _NOT_IN_COMMON_SET, "cannot be set here")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    problems: dict[str, None] = {}
    runs = []
    for seed, name in file.schedule:
        try:
            runs.append(_plan_run(file, base, name, file.runs[name], seed))
        except (ConfigError, TaskError) as error:
            problems |= dict.fromkeys(f"{source}: runs.{name}: {line}" for line in str(error).splitlines())
    if problems:
        raise ConfigError("\n".join(problems))
    return Plan(file, base, tuple(runs))


def reject_changes(plan: Plan) -> None:
    """Check that the settings of started runs have not changed.

    Raises:
        ConfigError: names every changed setting, with its old and new value.
    """
    changes = [
        f"{run.label}: {path}: {before[path]} -> {now[path]}"
        for run in plan.runs
        if run.record.exists()
        for before, now in [(json.loads(run.record.read_text())["settings"], run.settings)]
        for path in sorted(before.keys() & now.keys())
        if before[path] != now[path]
    ]
    if changes:
        lines = "\n  ".join(changes)
        raise ConfigError(
            f"{plan.dir} contains runs that started with other settings:\n  {lines}\n"
            "Give this comparison another name or dir, restore these settings, or delete the folders of these runs"
        )


def _base_path(base: str, source: Path) -> Path:
    if base in preset_names():
        return preset_path(base)
    path = source.parent / Path(base).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{source}: base: {base!r} is neither a preset ({', '.join(preset_names())}) nor a file at {path}"
        )
    return path


def _reject_reserved(settings: Iterable[str], reserved: Iterable[str], problem: str) -> None:
    for path in settings:
        for name in reserved:
            if _within(path, name) or _within(name, path):
                raise ConfigError(f"set: {path}: {problem}: {_NOT_IN_SET[name]}")


def _plan_run(file: CompareFile, base: Path, name: str, entry: RunEntry, seed: int) -> PlannedRun:
    _reject_reserved(entry.set, _NOT_IN_SET, "cannot differ between runs")
    label = f"{name}-seed{seed}"
    folder = file.folder / "runs" / label
    defaults = {path: value for path, value in COMMON_DEFAULTS.items() if not _contains(read_yaml(base), path)}
    settings = defaults | file.set | _fixed_settings(file, entry, label, folder, seed) | entry.set
    run = load_run(base, [f"{path}={_yaml(value)}" for path, value in settings.items()])
    _reject_shared_state(run)
    if not run.train.evaluation.num_prompts:
        raise ConfigError(
            "train.evaluation.num_prompts: is 0 in the base, so there is nothing to compare. Set at least 1"
        )
    Mixture(run.train.tasks, run.train.seed, run.train.on_bad_row).held_out(run.train.evaluation.num_prompts)
    return PlannedRun(name, seed, run.train.algorithm.kind, run)


def _fixed_settings(file: CompareFile, entry: RunEntry, label: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return the settings that the comparison fixes for a run, by path."""
    budget, num_parts = file.budget, file.num_evaluations + 1
    return {
        "run.name": label,
        "run.dir": str(folder),
        "seed": seed,
        "train.algorithm": entry.algorithm,
        "train.num_steps": budget.updates or _UNLIMITED_STEPS,
        "train.budget.tokens": budget.tokens,
        "train.budget.wall_s": budget.wall_s,
        "train.evaluation.every_steps": -(-(budget.updates or 0) // num_parts),
        "train.evaluation.every_tokens": -(-(budget.tokens or 0) // num_parts),
        "train.evaluation.every_wall_s": (budget.wall_s or 0.0) / num_parts,
    }


def _reject_shared_state(run: LocalRun) -> None:
    """Reject settings of the base or the environment that would let runs share state."""
    expected = {
        "learner.state_dir": (run.learner.state_dir, run.services_dir / "learner"),
        "value.state_dir": (run.value.state_dir, run.services_dir / "value"),
        "value.queue.url": (run.value.queue.url.get_secret_value(), f"unix://{run.socket}"),
    }
    for path, (found, wanted) in expected.items():
        if str(found) != str(wanted):
            raise ConfigError(f"{path}: is set in the base, but each run of a comparison needs its own. Remove it")


def _contains(tree: Mapping[str, Any], path: str) -> bool:
    """Whether a tree has a value at `path`."""
    here: Any = tree
    for part in path.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def _within(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in _NOT_LEARNING:
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _yaml(value: Any) -> str:
    """Return a value in the syntax of `--set`."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
