"""Checks that end a run: a learner it cannot resume on, engine mismatch, steps that trained nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError, SettingsError
from poise.orchestrator.storage.run_folder import RunState
from poise.orchestrator.tasks.config import GymTask
from poise_client.types import LearnerStatus, StepMetrics

logger = logging.getLogger(__name__)

_REJECTIONS = {
    "stale": "older than max_staleness allows; raise it for the learner, or lower it for the run",
    "future_version": "sampled by a newer policy version than the learner has; the learner lost its state, or another "
    "learner pushes to the same replicas",
    "duplicate": "trained on before; give the run a new name",
    "failed": "in a batch on which training failed repeatedly; see the error in the learner's log and the batch in the "
    "folder `failed` of its state_dir. If memory ran out, lower learner.micro_batch_tokens or set "
    "learner.gradient_checkpointing",
}
"""Meaning and remedy of the learner's reasons for rejecting rollouts."""


def check_resume(config: OrchestratorConfig, state: RunState, has_journal: bool, learner: LearnerStatus) -> None:
    """Check that the run can continue with this learner.

    Raises:
        SettingsError: the run is beyond `num_steps`, the learner lost its state, allows less staleness than the run
            needs, or lacks the critic that the algorithm needs (or has one that it does not use).
    """
    if state.next_step > config.num_steps:
        raise SettingsError(
            f"num_steps is {config.num_steps}, but this run has finished {state.next_step} steps. Set num_steps to "
            f"{state.next_step} to end the run here, or higher to continue it"
        )
    if learner.policy_version < state.policy_version:
        raise SettingsError(
            f"the learner is at version {learner.policy_version}, but this run left it at version "
            f"{state.policy_version} after {state.next_step} steps: the learner lost its state. Restore its state_dir, "
            "or start a new run"
        )
    if state.next_step == 0 and not has_journal and learner.policy_version > 0:
        logger.warning("the learner is already at version %d; the run starts from there", learner.policy_version)
    if learner.max_staleness < config.max_staleness:
        raise SettingsError(
            f"max_staleness of this run is {config.max_staleness}, but the learner accepts {learner.max_staleness}. "
            f"Raise it to {config.max_staleness} for the learner, or lower it to {learner.max_staleness} for the run. "
            "run.yaml has one `max_staleness` for both"
        )
    algorithm = config.algorithm
    if algorithm.needs_critic and not learner.has_critic:
        raise SettingsError(
            f"algorithm {algorithm.kind} needs a critic, but the learner has none. Set `learner.critic: {{}}` and "
            "start the learner in a new state_dir"
        )
    if learner.has_critic and not algorithm.needs_critic:
        raise SettingsError(
            f"the learner has a critic, but algorithm {algorithm.kind} does not use one. Remove learner.critic and "
            "start the learner in a new state_dir, or use algorithm ppo"
        )


def check_estimators(
    config: OrchestratorConfig, estimator: str, by_domain: Mapping[str, str], row_domains: Iterable[str] = ()
) -> None:
    """Check that the value service's estimators are those that the run needs.

    Args:
        config: settings of the run.
        estimator: the value service's `estimator`.
        by_domain: the value service's `estimator_by_domain`.
        row_domains: domains in the data files, which a task does not name.

    Raises:
        SettingsError: the value service uses another estimator than the algorithm, or a domain of the run needs two
            rollouts of each prompt and gets one.
    """
    if not config.algorithm.needs_probe:
        return
    wanted = config.algorithm.value_settings().get("estimator", estimator)
    if estimator != wanted:
        raise SettingsError(
            f"train.algorithm.estimator is {wanted}, but value.estimator of the value service is {estimator}. Set both "
            "to the same. In run.yaml, set only train.algorithm.estimator"
        )
    domains = {task.domain or task.name if isinstance(task, GymTask) else task.domain for task in config.tasks}
    domains.update(row_domains)
    for domain, own in by_domain.items():
        if own == "probe" and domain in domains and config.group_size < 2:
            raise SettingsError(
                f"value.estimator_by_domain.{domain} is probe, which needs 2 rollouts of each prompt, but "
                f"train.rollouts_per_prompt is {config.group_size}. Raise it, or set another estimator"
            )


def check_mismatch(max_kl: float | None, metrics: StepMetrics) -> None:
    """Raise `SettingsError` if engine and learner disagree about the log-probabilities of the first step."""
    found = metrics.mismatch_kl
    if max_kl is not None and found > max_kl:  # NaN if nothing was trained on
        raise SettingsError(
            f"engine and learner disagree about the tokens of step 0: KL is {found:.3g} nats per token (mean |Δ log p| "
            f"{metrics.mismatch_logprob:.3g}), but train.max_mismatch_kl is {max_kl:g}. One of them computes a "
            "different model, so training would follow a wrong gradient. Run `poise models check MODEL` to compare "
            "both with the reference forward pass. To train anyway, raise train.max_mismatch_kl or set it to null"
        )


def describe_rejections(num_rejected: Mapping[str, int]) -> str:
    """Return the number of rejected rollouts for each reason, with its remedy, as text."""
    return "; ".join(f"{count} {_REJECTIONS.get(reason, reason)}" for reason, count in num_rejected.items())


def untrained_reason(metrics: Mapping[str, Any]) -> str | None:
    """Return why a step trained nothing, from its line of metrics.jsonl; None if it trained."""
    num_rollouts, learner = metrics["num_rollouts"], metrics["learner"]
    if not num_rollouts:
        return "it has no rollouts"
    if metrics["num_rejected"] and not learner["num_rollouts"]:
        return f"the learner rejected all rollouts: {describe_rejections(metrics['num_rejected'])}"
    if learner["num_skipped_updates"] and not learner["num_updates"]:
        return (
            f"all {learner['num_skipped_updates']} updates had a non-finite loss or gradient; see the learner's log. "
            "Lower learner.optimizer.learning_rate, or look at the batches in the folder `nonfinite` of the learner's "
            "state_dir"
        )
    if metrics["verifier_errors"] >= num_rollouts:
        return f"the verifier failed on all {num_rollouts} rollouts; see the warnings above. Fix the verifier"
    if metrics.get("num_filtered_groups", 0) >= metrics["num_groups"]:
        return (
            f"algorithm {metrics['algorithm']} dropped all {metrics['num_groups']} groups, because the rewards within "
            f"each are equal (mean {metrics['reward']['mean']:.3f}). Check the verifier, or use easier or harder tasks"
        )
    return None


class UntrainedSteps:
    """Counts the steps of a run that trained nothing, and ends the run if there are too many in a row."""

    def __init__(self, limit: int, metrics: Iterable[Mapping[str, Any]] = ()) -> None:
        """End the run after `limit` such steps in a row. `metrics` are those of the finished steps."""
        self._limit = limit
        self._num_in_a_row = 0
        self._has_trained = False
        self._why = ""
        for line in metrics:
            self._count(line)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Count a finished step.

        Raises:
            RunError: it is the last of `limit` steps in a row that trained nothing.
        """
        self._count(metrics)
        if self._num_in_a_row >= self._limit:
            raise RunError(
                f"the last {self._num_in_a_row} steps trained nothing; train.max_untrained_steps is {self._limit}. "
                f"{self._why}. Fix this, then run the same command to resume, or raise train.max_untrained_steps"
            )

    def check_end(self) -> None:
        """Raise `RunError` if no step of the run trained anything."""
        if self._num_in_a_row and not self._has_trained:
            raise RunError(
                f"none of the run's {self._num_in_a_row} steps trained anything. {self._why}. Fix this, then start a "
                "new run, or raise train.num_steps to resume this one"
            )

    def _count(self, metrics: Mapping[str, Any]) -> None:
        why = untrained_reason(metrics)
        if why is None:
            self._num_in_a_row, self._has_trained = 0, True
        else:
            self._num_in_a_row, self._why = self._num_in_a_row + 1, f"Step {metrics['step']}: {why}"
