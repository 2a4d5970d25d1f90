"""A training step up to its journal: sampled, verified, valued, and on disk before any of it leaves.

Owns that order. Knows neither the learner nor the labels' way to the probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from poise.domain.rivals import RIVALS
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.run_folder import JournalledStep, RunError, RunFolder
from poise.orchestrator.scoring import Scorer, sampling_seed
from poise.orchestrator.services import Services
from poise.orchestrator.step import (
    ScoredGroup,
    StepBaselines,
    choose_baselines,
    group_features,
    labelled_groups,
    predictions,
    rival_baselines,
    step_numbers,
    training_batch,
)
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.orchestrator.watcher import Phases, RunClock, Watcher
from poise_client.errors import LabelsConsumedError
from poise_client.types import GroupBaselines, Sampling


class StepSampler:
    """Makes the steps of one run."""

    def __init__(
        self,
        config: OrchestratorConfig,
        folder: RunFolder,
        services: Services,
        mixture: Mixture,
        scorer: Scorer,
        watcher: Watcher,
    ) -> None:
        self._config = config
        self._folder = folder
        self._services = services
        self._mixture = mixture
        self._scorer = scorer
        self._watcher = watcher

    async def sample(self, step: int, policy_version: int, num_ahead: int, clock: RunClock) -> JournalledStep:
        """Sample a step from `policy_version` or newer, verify and value it, and journal all of it.

        `num_ahead` is how many steps before it the learner has yet to train on.

        Raises:
            RunError: the probe has learnt from a step of this name before.
        """
        config = self._config
        phases = Phases(self._watcher, step)
        problems, scored, errors = await self._groups(step, policy_version, phases)
        with phases("baselines"):
            baselines = await self._value(step, scored)
        numbers = {"step": step, "algorithm": config.algorithm} | step_numbers(scored, baselines, policy_version)
        generate_s = phases.seconds["generate"]
        numbers |= {
            "steps_ahead": num_ahead,
            "verifier_errors": errors,
            "tokens_per_s": numbers["response_tokens"]["total"] / generate_s if generate_s else 0.0,
        }
        predicted, realised, domains = predictions(scored, baselines)
        with phases("journal"):
            numbers["time_s"] = phases.seconds
            journalled = JournalledStep(
                step=step,
                labels=labelled_groups(config.run_id, step, scored),
                batch=training_batch(config.run_id, step, scored, baselines, config.sampling.temperature),
                numbers=numbers,
                values={"step": step, "predicted": predicted, "realised": realised, "domain": domains},
                samples=self._samples(step, problems, scored, baselines),
            )
            # The time of all this counts although the process may die before the step is finished.
            numbers["wall_s"] = clock.now_s()
            await _to_its_end(asyncio.to_thread(self._folder.write_journal, journalled))
        return journalled

    async def _groups(
        self, step: int, policy_version: int, phases: Phases
    ) -> tuple[list[Problem], list[ScoredGroup], int]:
        """Return the step's problems, a group with rewards for each, and how many rollouts could not be verified."""
        config = self._config
        problems = self._mixture.problems(step, config.prompts_per_step)
        sampling = Sampling(
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_tokens=config.sampling.max_tokens,
            stop=config.sampling.stop,
            seed=sampling_seed(config.seed, "train", step),
        )
        scored, errors = await self._scorer.score(
            config.run_id, step, problems, config.rollouts_per_prompt, sampling, policy_version, phases
        )
        return problems, scored, errors

    async def _value(self, step: int, scored: Sequence[ScoredGroup]) -> StepBaselines:
        """Return the step's baselines: by the algorithm, from what is known before any label of it has left."""
        if self._config.algorithm != "poise":
            return rival_baselines(scored, RIVALS[self._config.algorithm])
        return choose_baselines(scored, await self._ask_baselines(step, scored), self._config.bootstrap)

    async def _ask_baselines(self, step: int, scored: Sequence[ScoredGroup]) -> list[GroupBaselines]:
        try:
            return await self._services.estimate_baselines(self._config.run_id, step, group_features(scored))
        except LabelsConsumedError as error:
            raise RunError(
                f"the value service has learnt from step {step} of run {self._config.run_id!r} before: the name was "
                "used by another run. Give this run another run_id"
            ) from error

    def _samples(
        self, step: int, problems: Sequence[Problem], scored: Sequence[ScoredGroup], baselines: StepBaselines
    ) -> list[dict[str, Any]]:
        lines = []
        for index in range(min(self._config.samples_per_step, len(scored))):
            item, values_n = scored[index], baselines.values[index]
            advantages_n = baselines.advantages(index, item.rewards)
            for sibling, rollout in enumerate(item.group.rollouts):
                lines.append(
                    {
                        "step": step,
                        "group_id": item.group.group_id,
                        "domain": item.domain,
                        "prompt": _readable(problems[index]),
                        "answer": problems[index].answer,
                        "response": rollout.text,
                        "reward": float(item.rewards[sibling]),
                        "value": None if values_n is None else float(values_n[sibling]),
                        "advantage": float(advantages_n[sibling]),
                    }
                )
        return lines


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what cannot be interrupted, also when cancelled: whoever lets go of the folder then is the last to."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _readable(problem: Problem) -> str:
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in problem.prompt)
