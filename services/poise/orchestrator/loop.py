"""The training loop: steps are sampled, up to `max_staleness` of them ahead; published, submitted, in order; resumed.

Owns the order of steps. How one is sampled is `sampling`'s, which are in hand `pipeline`'s, how the policy is measured
`evaluating`'s.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from poise.orchestrator.budget import Spent, sampled_tokens
from poise.orchestrator.callbacks import Phases, RunClock, Watcher
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.evaluation.evaluator import Evaluator
from poise.orchestrator.pipeline import Pipeline
from poise.orchestrator.sampling.sampler import StepSampler
from poise.orchestrator.sampling.service_clients import Services
from poise.orchestrator.step_metrics import learner_numbers
from poise.orchestrator.storage.disk_retry import Storage
from poise.orchestrator.storage.run_folder import RunFolder, RunState
from poise.orchestrator.storage.step_journal import JournalledStep
from poise.orchestrator.untrained_steps import UntrainedSteps
from poise.runtime.tracing import step_span
from poise_client.types import LearnerStatus, StepMetrics

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
        storage: Storage | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._services = services
        self._sampler = sampler
        self._evaluator = evaluator
        self._watcher = watcher
        self._stopping = stopping  # set to stop after the steps in hand
        self._storage = storage or Storage(stopping)

    async def run(self, state: RunState) -> bool:
        """Go on from where the run is to its end; return whether the end was reached.

        Raises:
            SettingsError: the services hold another history than this run, the learner takes no rollouts as old, or
                engine and learner disagree in the first step.
            RunError: too many steps in a row trained nothing.
            PoiseClientError: a service refused in a way that waiting does not mend.
        """
        config = self._config
        status = await self._services.learner_status()
        pending = self._pending(state.next_step)
        self._sampler.recall([*self._folder.read_memory(), *(_memory(pending[step]) for step in sorted(pending))])
        self._check_history(state, status.policy_version, bool(pending))
        self._check_staleness(status)
        self._check_critic(status)
        policy_version, spent, limits = status.policy_version, state.spent, config.limits
        untrained = UntrainedSteps(config.max_untrained_steps, self._folder.read_metrics())
        clock = RunClock(max([state.wall_s, *(journalled.numbers["wall_s"] for journalled in pending.values())]))
        pipeline = Pipeline(partial(self._sample, clock=clock), pending)
        try:
            while not limits.are_reached(spent):
                step = spent.num_steps
                if self._stopping.is_set() and step not in pipeline:
                    return False
                if when := await self._evaluator.due(spent):
                    await pipeline.settle()  # nobody trains for free while the clock stands still
                    with clock.paused():
                        await self._evaluator.evaluate(when, spent, policy_version)
                num_ahead = 0 if self._stopping.is_set() else config.max_staleness
                pipeline.begin(range(step, min(step + 1 + num_ahead, config.num_steps)), policy_version)
                free_s = clock.now_s()
                journalled = await pipeline.take(step)
                waited_s = clock.now_s() - free_s
                numbers = await self._train(journalled)
                wall_s = clock.now_s()
                seconds = {"learner_waited": waited_s, "total": wall_s - spent.wall_s}
                spent = Spent(step + 1, spent.tokens + sampled_tokens(numbers), wall_s)
                numbers |= {"wall_s": wall_s, "tokens": spent.tokens, "time_s": numbers["time_s"] | seconds}
                await self._storage.keep(partial(self._folder.finish_step, journalled, numbers))
                self._watcher.step_done(numbers)
                untrained.add(numbers)
                policy_version = numbers["policy_version"]
        finally:
            await pipeline.close()
        await self._evaluator.evaluate("after", spent, policy_version)
        return True

    async def _sample(self, step: int, policy_version: int, num_ahead: int, clock: RunClock) -> JournalledStep:
        with step_span("sample", self._config.run_id, step):
            return await self._sampler.sample(step, policy_version, num_ahead, clock)

    async def _train(self, journalled: JournalledStep) -> dict[str, Any]:
        """Let a step's labels go to the probe and its advantages to the learner; return its numbers."""
        phases = Phases(self._watcher, journalled.step)
        with step_span("train", self._config.run_id, journalled.step):
            with phases("publish"):
                if journalled.labels:
                    await self._services.publish_labels(journalled.labels)
            with phases("train"):
                result = await self._services.submit_advantages(journalled.batch)
        if journalled.step == 0:
            self._check_mismatch(result.metrics)
        phases.seconds["weights"] = result.metrics.publish_s
        phases.seconds["train"] = max(0.0, phases.seconds["train"] - result.metrics.publish_s)
        seconds = journalled.numbers["time_s"] | phases.seconds
        return journalled.numbers | learner_numbers(result) | {"time_s": seconds}

    def _check_mismatch(self, metrics: StepMetrics) -> None:
        """Raise `SettingsError` where engine and learner disagree about the policy before training."""
        allowed, found = self._config.max_mismatch_kl, metrics.mismatch_kl
        if allowed is not None and found > allowed:  # not a number where nothing was trained on
            raise SettingsError(
                f"engine and learner disagree about the tokens of step 0: KL {found:.3g} nats a token, mean |Δ log p| "
                f"{metrics.mismatch_logprob:.3g}; `train.max_mismatch_kl` allows {allowed:g}. One of them leaves out "
                "part of the model, so training would follow a wrong gradient. `poise models check MODEL` compares "
                "both with the model's own forward. To train all the same, raise `train.max_mismatch_kl`, or set it to "
                "null"
            )

    def _pending(self, next_step: int) -> dict[int, JournalledStep]:
        """Return the steps that an earlier process sampled, without those that are further ahead than is now allowed.

        Of `next_step` labels or advantages may have left: it stays as it is. Nothing of the others has.
        """
        pending = self._folder.journal.read_pending(next_step)
        too_far = [
            step
            for step, journalled in pending.items()
            if step > next_step and journalled.numbers["steps_ahead"] > self._config.max_staleness
        ]
        if too_far:
            for step in range(max(pending), too_far[0] - 1, -1):  # from the end: a crash leaves no gap
                self._folder.journal.drop(step)
                del pending[step]
            logger.info("steps from %d on were sampled further ahead than max_staleness: again", too_far[0])
        return pending

    def _check_history(self, state: RunState, policy_version: int, journalled: bool) -> None:
        if state.next_step > self._config.num_steps:
            raise SettingsError(
                f"this run is at step {state.next_step} already, beyond num_steps {self._config.num_steps}; set "
                f"num_steps to {state.next_step} to end it here, or higher to go on"
            )
        if policy_version < state.policy_version:
            raise SettingsError(
                f"this run is at step {state.next_step}, which left the policy at version {state.policy_version}, and "
                f"the learner is at version {policy_version}: its state was lost. Restore the learner's state_dir, or "
                "start a new run"
            )
        if state.next_step == 0 and not journalled and policy_version > 0:
            logger.warning("the learner is at version %d already: this run goes on from there", policy_version)

    def _check_staleness(self, status: LearnerStatus) -> None:
        wanted = self._config.max_staleness
        if status.max_staleness < wanted:
            raise SettingsError(
                f"max_staleness of this run is {wanted}, and the learner's own is {status.max_staleness}: it would "
                f"reject what is sampled ahead. Set the learner's `max_staleness` to {wanted}, or the run's to "
                f"{status.max_staleness}. run.yaml has one `max_staleness` for both"
            )

    def _check_critic(self, status: LearnerStatus) -> None:
        algorithm = self._config.algorithm.kind
        needs_critic = self._config.algorithm.needs_critic
        if needs_critic and not status.has_critic:
            raise SettingsError(
                f"algorithm {algorithm} needs a critic, and the learner has none. Give it one (`learner.critic: {{}}`) "
                "in a new state_dir"
            )
        if status.has_critic and not needs_critic:
            raise SettingsError(
                f"the learner has a critic, which takes rewards; algorithm {algorithm} sends advantages. Start the "
                "learner without `critic`, in a new state_dir, or take algorithm ppo"
            )


def _memory(journalled: JournalledStep) -> dict[str, Any]:
    return {"step": journalled.step, "num_problems": journalled.numbers.get("num_groups")} | journalled.memory
