"""The metrics of the learner service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from poise_client.types import ReplicaResult, StepResult

_SECONDS = (0.05, 0.2, 1, 5, 20, 60, 300, 1800)
_STALENESS = (0, 1, 2, 4, 8, 16, 32)


class LearnerMetrics:
    """Declared once, on the service's own registry."""

    def __init__(self, registry: CollectorRegistry, is_stopped: Callable[[], bool]) -> None:
        Gauge(
            "poise_learner_training_stopped",
            "1 while nothing is trained on, for too many updates in a row were not finite; else 0.",
            registry=registry,
        ).set_function(lambda: float(is_stopped()))
        self._answered: tuple[str, float] | None = None
        """The run that was trained on last, and when it was answered: monotonic, s."""
        self._version = Gauge("poise_learner_policy_version", "Current policy version.", registry=registry)
        self._batches = Counter(
            "poise_learner_batches",
            "Batches answered, by whether they had been trained on.",
            ["duplicate"],
            registry=registry,
        )
        self._rollouts = Counter("poise_learner_rollouts", "Rollouts trained on.", registry=registry)
        self._tokens = Counter("poise_learner_response_tokens", "Response tokens trained on.", registry=registry)
        self._rejected = Counter(
            "poise_learner_rejected_rollouts", "Rollouts not trained on, by reason.", ["reason"], registry=registry
        )
        self._skipped = Counter(
            "poise_learner_skipped_updates",
            "Mini-batches that changed nothing, because their loss or gradient was not finite.",
            registry=registry,
        )
        self._train = Histogram("poise_learner_train_seconds", "Computing a step.", buckets=_SECONDS, registry=registry)
        self._publish = Histogram(
            "poise_learner_publish_seconds", "Publishing a version.", buckets=_SECONDS, registry=registry
        )
        self._wait = Histogram(
            "poise_learner_wait_seconds",
            "Waiting for a batch since the one before, of the same run, was answered; not while paused.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._staleness = Histogram(
            "poise_learner_staleness_versions", "Age of rollouts trained on.", buckets=_STALENESS, registry=registry
        )
        self._numbers = {
            name: Gauge(f"poise_learner_{metric}", text, registry=registry)
            for name, metric, text in (
                ("loss", "loss", "Policy loss of the last step."),
                ("entropy", "entropy_nats", "Entropy of the policy over the last step's tokens."),
                ("mismatch_logprob", "mismatch_logprob_nats", "Mean |learner - engine logprob| of the last step."),
                ("mismatch_kl", "mismatch_kl_nats", "KL(engine || learner) of the last step."),
                ("clip_share", "clip_ratio", "Share of the last step's tokens that were clipped."),
                ("clip_low_share", "clip_low_ratio", "Share of the last step's tokens clipped at the lower bound."),
                ("clip_high_share", "clip_high_ratio", "Share of the last step's tokens clipped at the upper bound."),
                ("dual_clip_share", "dual_clip_ratio", "Share of the last step's tokens clipped by the dual clip."),
                ("truncated_share", "truncated_ratio", "Share of the last step's tokens whose weight was truncated."),
                ("gradient_norm", "gradient_norm", "Norm of the last step's gradient before clipping."),
                ("reference_kl", "reference_kl_nats", "KL(policy || reference) of the last step; 0 without one."),
                ("value_loss", "value_loss", "Loss of the critic in the last step; 0 without one."),
                ("explained_variance", "explained_variance_ratio", "Share of the returns' variance that values told."),
                ("critic_gradient_norm", "critic_gradient_norm", "Norm of the critic's last gradient before clipping."),
                ("gradient_variance", "gradient_variance", "Variance of a mini-batch's gradient; 0 if not measured."),
                ("tokens_per_s", "tokens_per_second", "Tokens through the model by seconds of training, last step."),
                ("mfu", "mfu_ratio", "Share of the device's peak arithmetic in the last step; 0 where unknown."),
            )
        }

    def recovered(self, policy_version: int) -> None:
        """Record the version that the service goes on from."""
        self._version.set(policy_version)

    def resumed(self) -> None:
        """Record that a pause is over: it was no waiting for rollouts."""
        self._answered = None

    def observe(self, result: StepResult, run_id: str, began_s: float) -> None:
        """Record an answered batch of a run, begun at `began_s` of the monotonic clock."""
        before, self._answered = self._answered, (run_id, time.monotonic())
        self._batches.labels(duplicate=str(result.duplicate).lower()).inc()
        if result.duplicate:
            return
        metrics = result.metrics
        self._version.set(result.policy_version)
        for _, reason in result.rejected:
            self._rejected.labels(reason=reason).inc()
        if not metrics.num_rollouts:
            return
        self._rollouts.inc(metrics.num_rollouts)
        self._tokens.inc(metrics.num_tokens)
        self._skipped.inc(metrics.num_skipped_updates)
        self._train.observe(metrics.train_s)
        self._publish.observe(metrics.publish_s)
        if before is not None and before[0] == run_id:
            self._wait.observe(max(0.0, began_s - before[1]))
        for age, count in metrics.staleness.items():
            for _ in range(count):
                self._staleness.observe(age)
        for name, gauge in self._numbers.items():
            gauge.set(getattr(metrics, name))


@dataclass(frozen=True)
class ReplicaCollector(Collector):
    """How the replicas stand, read at scrape time."""

    results: Callable[[], tuple[ReplicaResult, ...]]

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        current = GaugeMetricFamily(
            "poise_learner_replica_current", "Whether a replica serves the current version.", labels=["replica"]
        )
        version = GaugeMetricFamily(
            "poise_learner_replica_policy_version", "Version a replica serves, as far as known.", labels=["replica"]
        )
        for result in self.results():
            current.add_metric([result.address], float(result.current))
            version.add_metric([result.address], result.policy_version)
        yield from (current, version)
