"""Rollouts for `gradient_variance.py`: of earlier steps, which estimators learn from, and fresh ones of one policy.

Starts the services of a preset, trains with RLOO for some steps, and samples. Everything is written to a folder, so an
interrupted benchmark resumes with the same rollouts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from value_process import ValueProcess

from poise.local.run_file import LocalRun, load_run, preset_path
from poise.orchestrator.algorithms.group import RlooOptions
from poise.orchestrator.callbacks import PhaseTimer
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.sampler import StepSampler
from poise.orchestrator.sampling.scored_groups import ScoredGroup, training_batch
from poise.orchestrator.sampling.scoring import Scorer
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise_client import AsyncValueClient
from poise_client.types import (
    EntropyStats,
    Features,
    Group,
    GroupBaselines,
    Rollout,
    RolloutId,
    VersionSpan,
)

FIRST_STEP = 100_000
"""First step of fresh rollouts, so that their prompts differ from those of earlier steps."""
PREPARED = "prepared.json"
COMMAND = [sys.executable, "-c", "from poise.cli import main; main()"]


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of one stage."""

    earlier: list[list[ScoredGroup]]
    """Groups of two of each earlier step."""
    pairs: list[ScoredGroup]
    """Fresh groups of two."""
    eights: list[ScoredGroup]
    """Fresh groups of eight."""
    model: str
    """Folder of the policy that the fresh rollouts were sampled from."""


class NoCallbacks:
    """Callbacks that do nothing."""

    def on_phase(self, step: int, name: str) -> None: ...

    def on_sampled(self, step: int, done: int, total: int) -> None: ...


def prepare(folder: Path, preset: str, trained: bool, num_steps: int, num_pairs: int, num_eights: int) -> Rollouts:
    """Return the stage's rollouts, from the folder if an earlier call has finished them."""
    file = folder / PREPARED
    wanted = {"preset": preset, "trained": trained, "steps": num_steps, "pairs": num_pairs, "eights": num_eights}
    if not file.exists():
        asyncio.run(_sample_all(folder, preset, trained, num_steps, num_pairs, num_eights))
        file.write_text(json.dumps(wanted))
    if (found := json.loads(file.read_text())) != wanted:
        raise click.ClickException(f"{folder} contains rollouts of {found}. Delete it, or use these options")
    earlier = [_read(path) for path in sorted(folder.glob("earlier-*.json"))]
    return Rollouts(earlier, _read(folder / "pairs.json"), _read(folder / "eights.json"), str(folder / "model"))


def run_of(folder: Path, preset: str) -> LocalRun:
    """Return the run whose services sample and train."""
    return load_run(preset_path(preset), _settings(folder))


def _settings(folder: Path) -> list[str]:
    return [f"run.dir={folder}/run", "run.name=frozen", "train.algorithm=rloo", "train.rollouts_per_prompt=2"]


async def _sample_all(
    folder: Path, preset: str, trained: bool, num_steps: int, num_pairs: int, num_eights: int
) -> None:
    run = run_of(folder, preset)
    options = ["--preset", preset, *(part for value in _settings(folder) for part in ("--set", value))]
    async with (
        _services_of(run, options),
        ServiceClients(run.train.endpoints, asyncio.Event()) as services,
        VerifierPool(run.train.verifier) as verifiers,
    ):
        version = (await services.learner_status()).policy_version
        per_step = run.train.prompts_per_step

        async def sample(step: int, num_prompts: int, num_rollouts: int, run_id: str) -> list[ScoredGroup]:
            config = run.train.model_copy(
                update={"prompts_per_step": num_prompts, "rollouts_per_prompt": num_rollouts, "run_id": run_id}
            )
            mixture, algorithm = Mixture(config.tasks, config.seed), config.algorithm.make(config.sampling.max_tokens)
            sampler = StepSampler(config, mixture, Scorer(services, verifiers), algorithm)
            callbacks: Any = NoCallbacks()
            found, _ = await sampler.sample(step, version, PhaseTimer(callbacks, step))
            return found.kept

        for step in range(num_steps):
            path = folder / f"earlier-{step:04d}.json"
            groups = await sample(step, per_step, 2, "earlier")
            if trained:
                algorithm = RlooOptions().make(run.train.sampling.max_tokens)
                baselines = await algorithm.baselines(groups, _no_estimates)
                batch = training_batch("earlier", step, groups, baselines, run.train.sampling.temperature)
                version = (await services.submit_advantages(batch)).policy_version
            _write(path, groups)
            click.echo(f"step {step}: reward {np.mean([g.rewards.mean() for g in groups]):.3f}", err=True)
        for name, num_groups, num_rollouts in (("pairs", num_pairs, 2), ("eights", num_eights, 8)):
            groups, step = [], FIRST_STEP * num_rollouts
            while len(groups) < num_groups:
                groups += await sample(step, min(100, num_groups - len(groups)), num_rollouts, name)
                step += 1
            _write(folder / f"{name}.json", groups)
            click.echo(f"{len(groups)} fresh groups of {num_rollouts}", err=True)
        exported = (await services.export_model("frozen")).path
    (folder / "model").unlink(missing_ok=True)
    (folder / "model").symlink_to(exported)


async def _no_estimates() -> list[GroupBaselines]:
    raise AssertionError("RLOO needs no estimates")


@asynccontextmanager
async def _services_of(run: LocalRun, options: list[str]) -> AsyncIterator[None]:
    up = subprocess.Popen([*COMMAND, "up", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        check = await asyncio.create_subprocess_exec(*COMMAND, "check", *options, stdout=subprocess.DEVNULL)
        if await check.wait():
            raise click.ClickException(f"the services did not come up; look at {run.dir / 'logs'}")
        yield
    finally:
        up.terminate()
        await asyncio.to_thread(up.wait)


async def estimates(
    folder: Path, preset: str, estimator: str, earlier: Sequence[Sequence[ScoredGroup]], fresh: Sequence[ScoredGroup]
) -> list[GroupBaselines]:
    """Return the baselines of fresh groups from a separate value service that has learnt the earlier steps."""
    probe = run_of(folder, preset).value.probe.model_dump(mode="json")
    settings = {"probe": probe} if estimator == "probe" else {"probe": probe, "estimator": estimator}
    with ValueProcess(folder / f"value-{estimator}", settings) as service:
        async with AsyncValueClient(service.address) as client:
            for step, groups in enumerate(earlier):
                await client.publish_labels([_labelled(each, f"e{i}", step) for i, each in enumerate(groups)])
            labelled = [_labelled(each, f"f{i}", FIRST_STEP) for i, each in enumerate(fresh)]
            answers = await client.estimate_baselines("benchmark", FIRST_STEP, labelled, wait_for_labels_s=120)
            report = await client.get_probe()
    if not all(answer.up_to_date for answer in answers):
        raise click.ClickException(f"{estimator}: the value service did not fit in time")
    errors = {each.estimator: round(each.weighted_error, 4) for probe in report.probes for each in probe.errors}
    click.echo(f"{estimator}: {[probe.estimator for probe in report.probes]} {errors}", err=True)
    return answers


def _labelled(item: ScoredGroup, group_id: str, step: int) -> Group:
    """Return the group with rewards and new ids, as the value service takes it."""
    group = item.group.scored(item.rewards, item.domain)
    rollouts = tuple(
        dataclasses.replace(rollout, id=RolloutId("benchmark", step, group_id, index))
        for index, rollout in enumerate(group.rollouts)
    )
    return dataclasses.replace(group, group_id=group_id, rollouts=rollouts, num_rollouts=len(rollouts))


def split(groups: Sequence[ScoredGroup], sibling: int) -> list[ScoredGroup]:
    """Return groups of one: the given sibling of each group."""
    return [
        ScoredGroup(
            dataclasses.replace(each.group, rollouts=(each.group.rollouts[sibling],), num_rollouts=1),
            each.problem,
            each.rewards[sibling : sibling + 1],
        )
        for each in groups
    ]


def _write(path: Path, groups: Sequence[ScoredGroup]) -> None:
    lines = [
        {
            "problem": dataclasses.asdict(item.problem),
            "group_id": item.group.group_id,
            "rewards": item.rewards.tolist(),
            "rollouts": [_tree(rollout) for rollout in item.group.rollouts],
        }
        for item in groups
    ]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(lines))
    partial.rename(path)


def _tree(rollout: Rollout) -> dict[str, Any]:
    features = rollout.features
    return {
        "id": dataclasses.astuple(rollout.id),
        "prompt": rollout.prompt_token_ids.tolist(),
        "tokens": rollout.token_ids.tolist(),
        "logprobs": rollout.logprobs.tolist(),
        "entropies": rollout.token_entropies.tolist(),
        "squares": rollout.sum_squared_probs.tolist(),
        "spans": [dataclasses.astuple(span) for span in rollout.version_spans],
        "prompt_hidden": features.prompt_hidden.tolist(),
        "response_hidden": features.response_hidden.tolist(),
        "stats": [
            dataclasses.astuple(part)
            for part in (features.output_entropy, features.reasoning_entropy, features.answer_entropy)
        ],
    }


def _read(path: Path) -> list[ScoredGroup]:
    groups = []
    for line in json.loads(path.read_text()):
        problem = Problem(**line["problem"])
        rollouts = tuple(map(_rollout, line["rollouts"]))
        group = Group(line["group_id"], rollouts, problem.domain)
        groups.append(ScoredGroup(group, problem, np.array(line["rewards"], np.float32)))
    return groups


def _rollout(tree: dict[str, Any]) -> Rollout:
    hidden = (np.array(tree[name], np.float32) for name in ("prompt_hidden", "response_hidden"))
    return Rollout(
        RolloutId(*tree["id"]),
        np.array(tree["prompt"], np.int32),
        np.array(tree["tokens"], np.int32),
        np.array(tree["logprobs"], np.float32),
        tuple(VersionSpan(*span) for span in tree["spans"]),
        Features(*hidden, *(EntropyStats(*part) for part in tree["stats"])),
        token_entropies=np.array(tree["entropies"], np.float16),
        sum_squared_probs=np.array(tree["squares"], np.float16),
    )
