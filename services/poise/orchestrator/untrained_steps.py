"""Steps that trained nothing: why one did not, and when too many in a row end the run.

Pure. Reads lines of metrics.jsonl, so that a resumed run counts on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from poise.orchestrator.errors import RunError

_REJECTIONS = {
    "stale": "from older weights than max_staleness allows: raise it for the learner, or lower it for the run",
    "future_version": "from newer weights than the learner holds: it lost its state, or another pushes to the replicas",
    "duplicate": "trained on before: give the run a name of its own",
    "failed": "of a batch on which training failed repeatedly: the learner's log names the error, and the folder "
    "`failed` in its state_dir holds the batch. If memory ran out, lower learner.micro_batch_tokens or set "
    "learner.gradient_checkpointing",
}
"""What the learner's reasons mean, and what to do."""


def describe_rejections(num_rejected: Mapping[str, int]) -> str:
    """Return how many rollouts the learner rejected for which reason, and what to do about it."""
    return "; ".join(f"{count} {_REJECTIONS.get(reason, reason)}" for reason, count in num_rejected.items())


def why_untrained(line: Mapping[str, Any]) -> str | None:
    """Return why a step trained nothing; None if it trained on something. Takes its line of metrics.jsonl."""
    num_rollouts, learner = line["num_rollouts"], line["learner"]
    if not num_rollouts:
        return "it had no rollout to train on"
    if line["num_rejected"] and not learner["num_rollouts"]:
        return f"the learner rejected every rollout: {describe_rejections(line['num_rejected'])}"
    if learner["num_skipped_updates"] and not learner["num_updates"]:
        return (
            f"none of its {learner['num_skipped_updates']} updates had a finite loss and gradient: the learner's log "
            "says more. Lower learner.optimizer.learning_rate, or look at the batches in the folder `nonfinite` of its "
            "state_dir"
        )
    if line["verifier_errors"] >= num_rollouts:
        return f"none of its {num_rollouts} responses could be verified: the log above says why. Fix the verifier"
    if line.get("num_filtered_groups", 0) >= line["num_groups"]:
        return (
            f"algorithm {line['algorithm']} filtered out all {line['num_groups']} groups, for the rewards within each "
            f"are equal (mean {line['reward']['mean']:.3f}). Check the verifier, or take easier or harder tasks"
        )
    return None


class UntrainedSteps:
    """Counts the steps of a run that trained nothing."""

    def __init__(self, limit: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up the finished steps of earlier processes; `limit` is the most in a row."""
        self._limit = limit
        self._in_a_row = 0
        self._has_trained = False
        self._why = ""
        for line in lines:
            self._count(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a finished step.

        Raises:
            RunError: it trained nothing, and neither did the steps before it, `limit` in all.
        """
        self._count(line)
        if self._in_a_row >= self._limit:
            raise RunError(
                f"the last {self._in_a_row} steps trained nothing (max_untrained_steps is {self._limit}). {self._why}. "
                "Then run the same command to resume, or raise train.max_untrained_steps"
            )

    def check_end(self) -> None:
        """Raise `RunError` if none of the run's steps trained anything."""
        if self._in_a_row and not self._has_trained:
            raise RunError(
                f"none of the run's {self._in_a_row} steps trained anything. {self._why}. Then start a new run, or "
                "raise train.num_steps to resume this one"
            )

    def _count(self, line: Mapping[str, Any]) -> None:
        why = why_untrained(line)
        if why is None:
            self._in_a_row, self._has_trained = 0, True
        else:
            self._in_a_row, self._why = self._in_a_row + 1, f"Step {line['step']}: {why}"
