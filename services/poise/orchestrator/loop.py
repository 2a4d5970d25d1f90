"""The training loop: sample, publish, submit, step by step; resumed where it stopped.

Owns the order of steps. How one is sampled is `sampling`'s, how the policy is measured `evaluating`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.evaluating import Evaluator
from poise.orchestrator.run_folder import RunError, RunFolder, RunState
from poise.orchestrator.sampling import StepSampler
from poise.orchestrator.services import Services
from poise.orchestrator.step import learner_numbers
from poise.orchestrator.watcher import Phases, Watcher

logger = logging.getLogger(__name__)


class TrainingLoop:
    """One run."""

    def __init__(
        self,
        config: OrchestratorConfig,
        folder: RunFolder,
        services: Services,
        sampler: StepSampler,
        evaluator: Evaluator,
        watcher: Watcher,
        stopping: asyncio.Event,
    ) -> None:
        self._config = config
        self._folder = folder
        self._services = services
        self._sampler = sampler
        self._evaluator = evaluator
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
            phases = Phases(self._watcher, step)
            if journalled is None:
                if when := self._evaluator.due(step):
                    await self._evaluator.evaluate(when, step, policy_version)
                journalled = await self._sampler.sample(step, policy_version, phases)
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
        await self._evaluator.evaluate("after", config.num_steps, policy_version)
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
