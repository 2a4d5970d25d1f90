"""The training loop: generate, verify, value, journal, publish, submit, step by step; resumed where it stopped.

Owns the order (baselines before labels; all of a step on disk before any of it leaves). Knows services by `Services`,
and people by `Watcher`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.run_folder import JournalledStep, RunError, RunFolder, RunState
from poise.orchestrator.services import Services
from poise.orchestrator.step import (
    ScoredGroup,
    StepBaselines,
    choose_baselines,
    group_features,
    labelled_groups,
    learner_numbers,
    predictions,
    step_numbers,
    training_batch,
)
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.orchestrator.verifiers.pool import VerifierPool
from poise_client.errors import LabelsConsumedError
from poise_client.types import Group, GroupBaselines, Prompt, Sampling

logger = logging.getLogger(__name__)

EVALUATION_SUFFIX = ":evaluation"
"""Rollouts of evaluations belong to a run of their own name: none of them can be taken for training data."""


class Watcher(Protocol):
    """Whoever is shown how a run goes."""

    def phase(self, step: int, name: str) -> None:
        """A phase of a step begins."""
        ...

    def step_done(self, numbers: dict[str, Any]) -> None:
        """A step is finished; `numbers` is its line of metrics.jsonl."""
        ...

    def evaluated(self, line: dict[str, Any]) -> None:
        """An evaluation is finished."""
        ...


class _Phases:
    """Seconds spent in each phase of a step."""

    def __init__(self, watcher: Watcher, step: int) -> None:
        self._watcher = watcher
        self._step = step
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._watcher.phase(self._step, name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class TrainingLoop:
    """One run."""

    def __init__(
        self,
        config: OrchestratorConfig,
        folder: RunFolder,
        services: Services,
        mixture: Mixture,
        verifiers: VerifierPool,
        watcher: Watcher,
        stopping: asyncio.Event,
    ) -> None:
        self._config = config
        self._folder = folder
        self._services = services
        self._mixture = mixture
        self._verifiers = verifiers
        self._watcher = watcher
        self._stopping = stopping  # set to stop after the step in hand

    async def run(self, state: RunState) -> bool:
        """Go on from where the run is to its end; return whether the end was reached.

        Raises:
            RunError: the services hold another history than this run.
            PoiseClientError: a service refused in a way that waiting does not mend.
        """
        config = self._config
        status = await self._services.learner_status()
        policy_version = status.policy_version
        first_step, wall_s = state.next_step, state.wall_s
        journalled = self._folder.read_journal(first_step)
        self._check_history(state, policy_version, journalled is not None)
        for step in range(first_step, config.num_steps):
            if self._stopping.is_set():
                return False
            started = time.monotonic()
            phases = _Phases(self._watcher, step)
            if journalled is None:
                await self._evaluate_if_due(step, policy_version)
                journalled = await self._sample_step(step, policy_version, phases)
            with phases("publish"):
                if config.algorithm == "poise":
                    await self._services.publish_labels(journalled.labels)
            with phases("train"):
                result = await self._services.submit_advantages(journalled.batch)
            phases.seconds["weights"] = result.metrics.publish_s
            phases.seconds["train"] = max(0.0, phases.seconds["train"] - result.metrics.publish_s)
            policy_version = result.policy_version
            seconds = journalled.numbers["time_s"] | phases.seconds
            took_s = journalled.numbers["time_s"].get("total", 0.0) + time.monotonic() - started
            wall_s += took_s
            numbers = journalled.numbers | learner_numbers(result)
            numbers |= {"wall_s": wall_s, "time_s": seconds | {"total": took_s}}
            self._folder.finish_step(journalled, numbers)
            self._watcher.step_done(numbers)
            journalled = None
        await self._evaluate("after", config.num_steps, policy_version)
        return True

    def _check_history(self, state: RunState, policy_version: int, journalled: bool) -> None:
        if state.next_step > self._config.num_steps:
            raise RunError(
                f"this run is at step {state.next_step} already, beyond num_steps {self._config.num_steps}; set "
                f"num_steps to {state.next_step} to end it here, or higher to go on"
            )
        if policy_version < state.policy_version:
            raise RunError(
                f"this run is at step {state.next_step}, which left the policy at version {state.policy_version}, and "
                f"the learner is at version {policy_version}: its state was lost. Restore the learner's state_dir, or "
                "start a new run"
            )
        if state.next_step == 0 and not journalled and policy_version > 0:
            logger.warning("the learner is at version %d already: this run goes on from there", policy_version)

    async def _sample_step(self, step: int, policy_version: int, phases: _Phases) -> JournalledStep:
        """Sample, verify and value a step, and journal all of it."""
        config = self._config
        problems = self._mixture.problems(step, config.prompts_per_step)
        sampling = Sampling(
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_tokens=config.sampling.max_tokens,
            stop=config.sampling.stop,
            seed=_seed(config.seed, "train", step),
        )
        started = time.monotonic()
        scored, errors = await self._sample_and_verify(
            config.run_id, step, problems, config.rollouts_per_prompt, sampling, policy_version, phases
        )
        with phases("baselines"):
            answers = await self._ask_baselines(step, scored)
        baselines = choose_baselines(scored, answers, config.bootstrap)
        numbers = {"step": step, "algorithm": config.algorithm} | step_numbers(scored, baselines, policy_version)
        generate_s = phases.seconds["generate"]
        numbers |= {
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
            numbers["time_s"] = phases.seconds | {"total": time.monotonic() - started}
            await asyncio.to_thread(self._folder.write_journal, journalled)
        numbers["time_s"].pop("total")
        return journalled

    async def _ask_baselines(self, step: int, scored: Sequence[ScoredGroup]) -> list[GroupBaselines] | None:
        if self._config.algorithm == "rloo":
            return None
        try:
            return await self._services.estimate_baselines(self._config.run_id, step, group_features(scored))
        except LabelsConsumedError as error:
            raise RunError(
                f"the value service has learnt from step {step} of run {self._config.run_id!r} before: the name was "
                "used by another run. Give this run another run_id"
            ) from error

    async def _sample_and_verify(
        self,
        run_id: str,
        step: int,
        problems: Sequence[Problem],
        num_rollouts: int,
        sampling: Sampling,
        policy_version: int,
        phases: _Phases,
    ) -> tuple[list[ScoredGroup], int]:
        """Return the groups in the order of `problems`, and how many rollouts could not be verified."""
        prompts = [
            Prompt(f"{index:05d}", problem.prompt if isinstance(problem.prompt, str) else list(problem.prompt))
            for index, problem in enumerate(problems)
        ]
        verifying: dict[int, asyncio.Task[tuple[ScoredGroup, int]]] = {}
        try:
            with phases("generate"):
                groups = self._services.sample(run_id, step, prompts, num_rollouts, sampling, policy_version)
                async with contextlib.aclosing(groups):
                    async for group in groups:
                        index = int(group.group_id)
                        verifying[index] = asyncio.create_task(self._verify(problems[index], group))
            with phases("verify"):
                verified = [await verifying[index] for index in range(len(problems))]
        finally:
            for task in verifying.values():
                task.cancel()
        return [scored for scored, _ in verified], sum(errors for _, errors in verified)

    async def _verify(self, problem: Problem, group: Group) -> tuple[ScoredGroup, int]:
        verdicts = await asyncio.gather(*(self._verifiers.verify(problem, r.text) for r in group.rollouts))
        rewards = np.array([verdict.reward for verdict in verdicts], np.float32)
        return ScoredGroup(group, problem.domain, rewards), sum(verdict.error is not None for verdict in verdicts)

    def _samples(
        self, step: int, problems: Sequence[Problem], scored: Sequence[ScoredGroup], baselines: StepBaselines
    ) -> list[dict[str, Any]]:
        lines = []
        for index in range(min(self._config.samples_per_step, len(scored))):
            item, values_n, baseline_n = scored[index], baselines.values[index], baselines.baselines[index]
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
                        "advantage": float(item.rewards[sibling] - baseline_n[sibling]),
                    }
                )
        return lines

    async def _evaluate_if_due(self, step: int, policy_version: int) -> None:
        """Measure the policy that the steps before `step` made, where that is asked for."""
        every = self._config.evaluation.every_steps
        if step == 0:
            await self._evaluate("before", step, policy_version)
        elif every and step % every == 0:
            await self._evaluate("step", step, policy_version)

    async def _evaluate(self, when: str, step: int, policy_version: int) -> None:
        config = self._config.evaluation
        if not config.num_prompts or self._folder.evaluated(when, step):
            return
        line = await self.measure(when, step, policy_version)
        self._folder.write_evaluation(line)
        self._watcher.evaluated(line)

    async def measure(self, when: str, step: int, policy_version: int) -> dict[str, Any]:
        """Sample the held-out prompts and return their rewards, a line of evaluations.jsonl."""
        config = self._config.evaluation
        problems = self._mixture.held_out(config.num_prompts)
        sampling = Sampling(
            temperature=config.temperature,
            max_tokens=self._config.sampling.max_tokens,
            stop=self._config.sampling.stop,
            seed=_seed(self._config.seed, "evaluation", 0),
        )
        phases = _Phases(self._watcher, step)
        scored, errors = await self._sample_and_verify(
            self._config.run_id + EVALUATION_SUFFIX,
            step,
            problems,
            config.rollouts_per_prompt,
            sampling,
            policy_version,
            phases,
        )
        by_domain: dict[str, list[float]] = {}
        for item in scored:
            by_domain.setdefault(item.domain, []).append(float(item.rewards.mean()))
        return {
            "when": when,
            "step": step,
            "policy_version": policy_version,
            "num_prompts": len(problems),
            "rollouts_per_prompt": config.rollouts_per_prompt,
            "rewards": [item.rewards.tolist() for item in scored],
            "by_domain": {name: float(np.mean(means)) for name, means in sorted(by_domain.items())},
            "verifier_errors": errors,
            "seconds": sum(phases.seconds.values()),
        }


def _seed(seed: int, purpose: str, step: int) -> int:
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _readable(problem: Problem) -> str:
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in problem.prompt)
