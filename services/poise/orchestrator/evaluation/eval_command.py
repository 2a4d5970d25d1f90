"""`poise eval`: one measurement of what is served, told as a table and kept as files.

    generations.jsonl   every rollout, a line each
    evaluation.json     the scores with their intervals, and how they were sampled

Knows neither who started the services nor where a model came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError
from poise.orchestrator.evaluation.evaluator import Evaluator
from poise.orchestrator.progress import MeasurementWatcher
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.scoring import Scorer
from poise.orchestrator.sampling.service_clients import Services
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.data_check import check_data
from poise.orchestrator.tasks.mixture import Mixture
from poise.report.scores import score_names, score_rows
from poise.runtime.cli.console import OutputConsole
from poise.runtime.config.settings import ConfigError
from poise.runtime.files.atomic import write_file, write_lines


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured."""

    model: str
    """What the weights are, for people and for evaluation.json."""
    is_served: bool
    """By services that hold a learner's policy; else by a generation service alone, which knows no versions."""
    policy_version: int | None = None
    """Of weights that a learner made; of what is served, the learner tells."""


def load_held_out(config: OrchestratorConfig) -> Mixture:
    """Return the tasks, with as many held-out problems as are to be measured.

    Raises:
        ConfigError: that is none.
        TaskError: there are too few, or something is wrong with a task.
    """
    if not config.evaluation.num_prompts:
        raise ConfigError("evaluation.num_prompts: is 0, which leaves nothing to measure; set it to 1 or more")
    mixture = Mixture(config.tasks, config.seed, config.on_bad_row)
    mixture.held_out(config.evaluation.num_prompts)
    return mixture


@contextlib.contextmanager
def evaluation_folder(path: Path) -> Iterator[Path]:
    """Make the folder that a measurement goes to; an interrupt before its end removes what was made.

    Raises:
        ConfigError: it cannot be made, or holds a measurement.
    """
    if (path / "evaluation.json").exists():
        raise ConfigError(f"--out: {path} holds an evaluation already; name another folder")
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be used: {error}") from error
    try:
        yield path
    except (KeyboardInterrupt, asyncio.CancelledError):
        if is_new and not (path / "evaluation.json").exists():
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # of a measurement that left nothing
            path.rmdir()


async def measure(config: OrchestratorConfig, mixture: Mixture, subject: Subject, folder: Path, as_json: bool) -> None:
    """Measure what `config.endpoints` serve, write it into `folder` and print it.

    Raises:
        RunError: the services are not up.
        PoiseClientError: one refuses.
    """
    console = OutputConsole()
    watcher = MeasurementWatcher(config.evaluation.num_prompts, Console(file=sys.stderr), config.logging)
    stopping = asyncio.Event()  # an interrupt ends it at once
    version = subject.policy_version
    async with Services(config.endpoints, stopping) as services, VerifierPool(config.verifier) as verifiers:
        evaluator = Evaluator(config, RunFolder(config.run_dir), mixture, Scorer(services, verifiers), watcher)
        with watcher:
            if subject.is_served:
                version = await _served_version(services, config)
            else:
                await services.wait_for_generation()
            await check_data(config, mixture, services, watcher.say)
            at_least = version if version is not None and subject.is_served else 0
            measurement = await evaluator.measure("now", version or 0, at_least)
    about = {"model": subject.model, "policy_version": version}
    evaluation = {"run_id": config.run_id} | measurement.line | about | {"generations": "generations.jsonl"}
    of_each = {} if subject.is_served else {"policy_versions": [] if version is None else [version]}
    write_lines(folder / "generations.jsonl", (line | of_each for line in measurement.generations()))
    write_file(folder / "evaluation.json", (json.dumps(evaluation, indent=2, allow_nan=False) + "\n").encode())
    text = json.dumps(evaluation) if as_json else "\n".join([*describe(evaluation), f"written to {folder}"])
    console.print(text, highlight=False, soft_wrap=True, markup=False)


async def _served_version(services: Services, config: OrchestratorConfig) -> int:
    if not await services.is_learner_there():
        raise RunError(
            f"no learner answers at {config.endpoints.learner}: start the services with `poise up` and the same "
            "options, or measure without them: `poise eval --model FOLDER` takes any model, `--checkpoint` the run's "
            "newest checkpoint"
        )
    await services.wait_until_up(with_value=False)
    return (await services.learner_status()).policy_version


def describe(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the lines that people are shown of evaluation.json."""
    version = "" if evaluation["policy_version"] is None else f", policy version {evaluation['policy_version']}"
    sampling = evaluation["sampling"]
    lines = [
        f"{evaluation['model']}{version}",
        f"{evaluation['num_prompts']} held-out prompts x {evaluation['rollouts_per_prompt']} rollouts at temperature "
        f"{sampling['temperature']:g}, top_p {sampling['top_p']:g}, in {evaluation['seconds']:.0f} s; a rollout passes "
        f"at reward {evaluation['pass_threshold']:g}; 95 % intervals over prompts",
        "",
        *_table(evaluation["scores"]),
    ]
    if errors := evaluation["verifier_errors"]:
        lines.append(f"{errors} rollouts could not be verified and count as 0")
    return [*lines, ""]


def _table(scores: Mapping[str, Any]) -> list[str]:
    names = score_names(scores["overall"])
    rows = [["", "prompts", *names]]
    for group, entry in score_rows(scores):
        cells = [f"{entry[name]['mean']:.3f} ({entry[name]['low']:.3f}-{entry[name]['high']:.3f})" for name in names]
        rows.append([group, str(entry["num_prompts"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
