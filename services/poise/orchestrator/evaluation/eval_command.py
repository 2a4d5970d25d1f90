"""`poise eval`: one evaluation of the served weights, printed as a table and written to files.

generations.jsonl   all rollouts, one line each
evaluation.json     scores with their intervals, and the sampling options
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
from poise.orchestrator.progress import EvaluationProgress
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.scoring import Scorer
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.data_check import check_data
from poise.orchestrator.tasks.mixture import Mixture
from poise.report.scores import score_names, score_rows
from poise.runtime.cli.console import OutputConsole
from poise.runtime.config.settings import ConfigError
from poise.runtime.files.atomic import write_file, write_lines


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """The weights to evaluate."""

    name: str
    """Name or path, for messages and evaluation.json."""
    is_policy: bool
    """True for the current policy of a running learner; False if generation serves the weights without a learner."""
    policy_version: int | None = None
    """Version of a checkpoint. None for other models; the learner reports that of its current policy."""


def load_tasks(config: OrchestratorConfig) -> Mixture:
    """Return the tasks, after checking that they have enough held-out problems.

    Raises:
        ConfigError: `evaluation.num_prompts` is 0.
        TaskError: there are too few held-out problems, or a task is invalid.
    """
    if not config.evaluation.num_prompts:
        raise ConfigError("evaluation.num_prompts is 0; set it to 1 or more to evaluate")
    mixture = Mixture(config.tasks, config.seed, config.on_bad_row)
    mixture.held_out(config.evaluation.num_prompts)
    return mixture


@contextlib.contextmanager
def evaluation_folder(path: Path) -> Iterator[Path]:
    """Create the folder of an evaluation; delete it if the evaluation is interrupted.

    Raises:
        ConfigError: it cannot be created, or contains an evaluation.
    """
    if (path / "evaluation.json").exists():
        raise ConfigError(f"--out: {path} already contains an evaluation; use another folder")
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {path} is not usable: {error}") from error
    try:
        yield path
    except (KeyboardInterrupt, asyncio.CancelledError):
        if is_new and not (path / "evaluation.json").exists():
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # only an empty folder
            path.rmdir()


async def evaluate_served(
    config: OrchestratorConfig, mixture: Mixture, model: EvaluatedModel, folder: Path, as_json: bool
) -> None:
    """Evaluate the weights that `config.endpoints` serve, write the result into `folder` and print it.

    Raises:
        RunError: the services are not up.
        PoiseClientError: a service failed with a permanent error.
    """
    console = OutputConsole()
    progress = EvaluationProgress(config.evaluation.num_prompts, Console(file=sys.stderr), config.logging)
    stopping = asyncio.Event()  # never set: an interrupt ends the command at once
    version = model.policy_version
    async with ServiceClients(config.endpoints, stopping) as services, VerifierPool(config.verifier) as verifiers:
        evaluator = Evaluator(config, RunFolder(config.run_dir), mixture, Scorer(services, verifiers), progress)
        with progress:
            if model.is_policy:
                version = await _served_version(services, config)
            else:
                await services.wait_for_generation()
            await check_data(config, mixture, services, progress.print)
            at_least = version if version is not None and model.is_policy else 0
            result = await evaluator.measure("now", version or 0, at_least)
    about = {"model": model.name, "policy_version": version, "generations": "generations.jsonl"}
    evaluation = {"run_id": config.run_id} | result.line | about
    versions = {} if model.is_policy else {"policy_versions": [] if version is None else [version]}
    write_lines(folder / "generations.jsonl", (line | versions for line in result.generations()))
    write_file(folder / "evaluation.json", (json.dumps(evaluation, indent=2, allow_nan=False) + "\n").encode())
    text = json.dumps(evaluation) if as_json else "\n".join([*describe(evaluation), f"written to {folder}"])
    console.print(text, highlight=False, soft_wrap=True, markup=False)


async def _served_version(services: ServiceClients, config: OrchestratorConfig) -> int:
    if not await services.is_learner_reachable():
        raise RunError(
            f"no learner answers at {config.endpoints.learner}. Start the services with `poise up` and the same "
            "options. Without services, `poise eval --model FOLDER` evaluates any model, and `poise eval --checkpoint` "
            "the run's newest checkpoint"
        )
    await services.wait_until_up(with_value=False)
    return (await services.learner_status()).policy_version


def describe(evaluation: Mapping[str, Any]) -> list[str]:
    """Return an evaluation as lines of text."""
    version = "" if evaluation["policy_version"] is None else f", policy version {evaluation['policy_version']}"
    sampling = evaluation["sampling"]
    lines = [
        f"{evaluation['model']}{version}",
        f"{evaluation['num_prompts']} held-out prompts x {evaluation['rollouts_per_prompt']} rollouts at temperature "
        f"{sampling['temperature']:g}, top_p {sampling['top_p']:g}, in {evaluation['seconds']:.0f} s; a rollout passes "
        f"with a reward of at least {evaluation['pass_threshold']:g}; 95 % intervals over prompts",
        "",
        *_table(evaluation["scores"]),
    ]
    if errors := evaluation["verifier_errors"]:
        lines.append(f"the verifier failed on {errors} rollouts; their reward is 0")
    return [*lines, ""]


def _table(scores: Mapping[str, Any]) -> list[str]:
    names = score_names(scores["overall"])
    rows = [["", "prompts", *names]]
    for group, entry in score_rows(scores):
        cells = [f"{entry[name]['mean']:.3f} ({entry[name]['low']:.3f}-{entry[name]['high']:.3f})" for name in names]
        rows.append([group, str(entry["num_prompts"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
