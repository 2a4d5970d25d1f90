"""The training loop.

`sample_step` samples a step, scores it, gets its baselines and journals it; `train_step` publishes its labels and
submits its advantages. `run` does both for every step, samples up to `max_staleness` steps ahead, evaluates when it is
due, and resumes after a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from poise.algorithms.baselines import BIASES
from poise.orchestrator.budget import Usage
from poise.orchestrator.callbacks import Callbacks, PhaseTimer, RunClock
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.evaluation.evaluator import Evaluator
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.run_checks import UntrainedSteps, check_estimators, check_mismatch, check_resume
from poise.orchestrator.sampling.prefetch import Prefetcher
from poise.orchestrator.sampling.sampler import StepSampler
from poise.orchestrator.sampling.scored_groups import (
    ScoredGroup,
    StepBaselines,
    labelled_groups,
    training_batch,
)
from poise.orchestrator.sampling.scoring import Scorer
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.step_metrics import learner_metrics, predictions, sampling_metrics
from poise.orchestrator.storage.disk_retry import DiskRetry
from poise.orchestrator.storage.run_folder import RunFolder, RunState
from poise.orchestrator.storage.step_journal import JournalledStep
from poise.orchestrator.tasks.mixture import Mixture
from poise.runtime.tracing import step_span
from poise_client.errors import LabelsConsumedError
from poise_client.types import GroupBaselines, ProbeReport

logger = logging.getLogger(__name__)


class TrainingLoop:
    """The training loop of one run."""

    def __init__(
        self,
        config: OrchestratorConfig,
        folder: RunFolder,
        services: ServiceClients,
        verifiers: VerifierPool,
        mixture: Mixture,
        callbacks: Callbacks,
        stopping: asyncio.Event,
    ) -> None:
        """Create it. Setting `stopping` stops the run after the steps that are already sampled."""
        self._config = config
        self._folder = folder
        self._services = services
        self._mixture = mixture
        self._callbacks = callbacks
        self._stopping = stopping
        self._disk = DiskRetry(stopping, folder.check_open)
        self._algorithm = config.algorithm.make(config.sampling.max_tokens)
        scorer = Scorer(services, verifiers)
        self._sampler = StepSampler(config, mixture, scorer, self._algorithm)
        self._evaluator = Evaluator(config, folder, mixture, scorer, callbacks, self._disk)
        self._clock = RunClock()
        self._biases = [*config.algorithm.biases]
        self._probe_report = ProbeReport((), 0, 0, 0, 0, **config.algorithm.value_settings())
        """The value service's answer; until `run` requests it, the estimator that the algorithm expects."""
        self._probe_up_to_date = True
        """Result of the last step that waited for the probe."""

    async def run(self, state: RunState) -> bool:
        """Continue the run from `state` to its end; return whether it reached its end.

        Raises:
            SettingsError: the run cannot continue on this learner (see `check_resume`) or value service (see
                `check_estimators`), engine and learner disagree in the first step, or the value service has already
                consumed labels of a step of this run_id.
            RunError: too many steps in a row trained nothing.
            PoiseClientError: a service failed with a permanent error.
        """
        config, limits = self._config, self._config.limits
        learner = await self._services.learner_status()
        if config.algorithm.needs_probe:
            report = self._probe_report = await self._services.probe_report()
            row_domains = {problem.domain for file in self._mixture.files for problem in file.problems}
            check_estimators(config, report.estimator, report.domain_estimators, row_domains)
        pending = self._read_pending(state.next_step)
        self._resume(self._folder.read_step_states())
        self._resume(
            [
                {"step": step, "num_problems": journalled.metrics.get("num_groups"), **journalled.state}
                for step, journalled in sorted(pending.items())
            ]
        )
        check_resume(config, state, bool(pending), learner)
        self._log_biases(learner.loss_aggregation)
        policy_version, usage = learner.policy_version, state.usage
        untrained = UntrainedSteps(config.max_untrained_steps, self._folder.read_metrics())
        clock = self._clock = RunClock(max([state.wall_s, *(each.metrics["wall_s"] for each in pending.values())]))
        prefetcher = Prefetcher(self.sample_step, pending)
        try:
            while not limits.are_reached(usage):
                step = usage.num_steps
                if self._stopping.is_set() and step not in prefetcher:
                    return False
                if when := await self._evaluator.due(usage):
                    await prefetcher.drain()  # finish sampling before pausing the clock
                    with clock.paused():
                        await self._evaluator.evaluate(when, usage, policy_version)
                num_ahead = 0 if self._stopping.is_set() else config.max_staleness
                prefetcher.start(range(step, min(step + 1 + num_ahead, config.num_steps)), policy_version)
                started_s = clock.now_s()
                journalled = await prefetcher.take(step)
                waited_s = clock.now_s() - started_s
                metrics = await self.train_step(journalled)
                wall_s, tokens = clock.now_s(), usage.tokens + metrics["response_tokens"]["total"]
                seconds = {"learner_waited": waited_s, "total": wall_s - usage.wall_s}
                usage = Usage(step + 1, tokens, wall_s)
                metrics |= {"wall_s": wall_s, "tokens": tokens, "time_s": metrics["time_s"] | seconds}
                await self._disk.run(partial(self._folder.finish_step, journalled, metrics))
                self._callbacks.on_step_end(metrics)
                untrained.add(metrics)
                policy_version = metrics["policy_version"]
        finally:
            await prefetcher.close()
        await self._evaluator.evaluate("after", usage, policy_version)
        return True

    async def sample_step(self, step: int, policy_version: int, num_ahead: int = 0) -> JournalledStep:
        """Sample a step from `policy_version` or newer, score it, get its baselines, and journal it.

        `num_ahead` is the number of earlier steps that the learner has yet to train on.

        Raises:
            SettingsError: the value service has already consumed labels of the step, or generation rejects all prompts.
        """
        config, timer = self._config, PhaseTimer(self._callbacks, step)
        with step_span("sample", config.run_id, step):
            found, sampler_state = await self._sampler.sample(step, policy_version, timer)
            groups = found.kept
            with timer("baselines"):
                baselines = await self._algorithm.baselines(groups, lambda: self._estimate_baselines(step, groups))
            metrics: dict[str, Any] = {
                "step": step,
                "algorithm": config.algorithm.kind,
                "biases": list(self._biases),
                **sampling_metrics(found.sampled, groups, baselines, policy_version),
                "steps_ahead": num_ahead,
                "num_draws": found.num_draws,
                "num_rejected_prompts": len(found.rejected),
                "num_filtered_groups": found.num_filtered,
                "verifier_errors": found.num_errors,
                "time_s": timer.seconds,
            }
            generate_s = timer.seconds["generate"]
            metrics["tokens_per_s"] = metrics["response_tokens"]["total"] / generate_s if generate_s else 0.0
            state = {**self._algorithm.step_state(groups), **sampler_state}
            with timer("journal"):
                journalled = JournalledStep(
                    step=step,
                    labels=labelled_groups(groups, self._probe_report) if config.algorithm.needs_probe else [],
                    batch=training_batch(config.run_id, step, groups, baselines, config.sampling.temperature),
                    metrics=metrics,
                    values={"step": step, **predictions(groups, baselines)},
                    rollouts=_rollout_lines(step, groups[: config.samples_per_step], baselines),
                    state=state,
                )
                metrics["wall_s"] = self._clock.now_s()  # counts even if the process exits before the step is finished
                await self._disk.run(partial(self._folder.journal.write, journalled))
            self._algorithm.load_step_state(state)
            return journalled

    async def train_step(self, journalled: JournalledStep) -> dict[str, Any]:
        """Publish the labels of a step to the probe, submit its advantages to the learner; return its metrics."""
        timer = PhaseTimer(self._callbacks, journalled.step)
        with step_span("train", self._config.run_id, journalled.step):
            with timer("publish"):
                if journalled.labels:
                    await self._services.publish_labels(journalled.labels)
            with timer("train"):
                result = await self._services.submit_advantages(journalled.batch)
        if journalled.step == 0:
            check_mismatch(self._config.max_mismatch_kl, result.metrics)
        timer.seconds["weights"] = result.metrics.publish_s
        timer.seconds["train"] = max(0.0, timer.seconds["train"] - result.metrics.publish_s)
        seconds = journalled.metrics["time_s"] | timer.seconds
        return journalled.metrics | learner_metrics(result) | {"time_s": seconds}

    async def _estimate_baselines(self, step: int, groups: Sequence[ScoredGroup]) -> list[GroupBaselines]:
        """Request a step's baselines. On-policy runs wait until the probe is fitted on all labels of earlier steps.

        Runs that sample ahead do not wait: which labels are published by then depends on the learner's speed, so
        waiting would not make them reproducible.
        """
        config = self._config
        wait_s = config.wait_for_labels_s if config.max_staleness == 0 else 0.0
        try:
            labelled = labelled_groups(groups, self._probe_report)
            answers = await self._services.estimate_baselines(config.run_id, step, labelled, wait_s)
        except LabelsConsumedError as error:
            raise SettingsError(
                f"the value service has already consumed labels of step {step} of run {config.run_id!r}. Set another "
                "run_id"
            ) from error
        if wait_s:
            self._log_probe_state(step, all(answer.up_to_date for answer in answers))
        return answers

    def _log_biases(self, loss_aggregation: str) -> None:
        """Log and keep the biases of the gradient: a warning for those of the algorithm. The default loss has one."""
        of_algorithm, of_loss = self._biases, [name for name in BIASES if name == loss_aggregation]
        for level, names in ((logging.WARNING, of_algorithm), (logging.INFO, of_loss)):
            if names:
                reasons = "; ".join(BIASES[name] for name in names)
                logger.log(level, "the gradient is biased: %s. See docs/reference/algorithms.md", reasons)
        self._biases = of_algorithm + of_loss

    def _log_probe_state(self, step: int, up_to_date: bool) -> None:
        """Log when the probe falls behind and when it catches up."""
        if self._probe_up_to_date and not up_to_date:
            logger.warning(
                "step %d uses a probe that may lack labels of earlier steps: it was not fitted on them within "
                "wait_for_labels_s = %g. Check whether consuming is paused, the queue is down, or a fit failed. The "
                "run stays valid, but may not be reproducible",
                step,
                self._config.wait_for_labels_s,
            )
        elif up_to_date and not self._probe_up_to_date:
            logger.info("step %d uses a probe fitted on all earlier labels again", step)
        self._probe_up_to_date = up_to_date

    def _resume(self, states: Sequence[dict[str, Any]]) -> None:
        for state in states:
            self._sampler.resume(state["step"], state)
            self._algorithm.load_step_state(state)

    def _read_pending(self, next_step: int) -> dict[int, JournalledStep]:
        """Return the steps that an earlier process sampled. Drop those further ahead than `max_staleness` now allows.

        `next_step` is never dropped: its labels or advantages may have been sent. Those of later steps were not.
        """
        pending = self._folder.journal.read_pending(next_step)
        too_far = [
            step
            for step, journalled in pending.items()
            if step > next_step and journalled.metrics["steps_ahead"] > self._config.max_staleness
        ]
        if too_far:
            for step in range(max(pending), too_far[0] - 1, -1):  # from the end, so that a crash leaves no gap
                self._folder.journal.drop(step)
                del pending[step]
            logger.info("resampling steps from %d on: they are further ahead than max_staleness allows", too_far[0])
        return pending


def _rollout_lines(step: int, groups: Sequence[ScoredGroup], baselines: StepBaselines) -> list[dict[str, Any]]:
    """Return the lines of rollouts.jsonl for the first groups of a step."""
    lines = []
    for index, item in enumerate(groups):
        values_n, advantages_n = baselines.value(index), baselines.advantages(index, item.rewards)
        for sibling, rollout in enumerate(item.group.rollouts):
            lines.append(
                {
                    "step": step,
                    "group_id": item.group.group_id,
                    "domain": item.domain,
                    "prompt": item.problem.prompt_text,
                    "answer": item.problem.answer,
                    "response": rollout.text,
                    "reward": float(item.rewards[sibling]),
                    "value": None if values_n is None else float(values_n[sibling]),
                    "advantage": None if baselines.uses_critic else float(advantages_n[sibling]),
                }
            )
    return lines
