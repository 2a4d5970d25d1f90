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
    """Prometheus metrics on the service's registry."""

    def __init__(self, registry: CollectorRegistry, is_stopped: Callable[[], bool]) -> None:
        Gauge(
            "poise_learner_training_stopped",
            "1 if training stopped after too many updates in a row that were not finite, else 0.",
            registry=registry,
        ).set_function(lambda: float(is_stopped()))
        self._answered: tuple[str, float] | None = None
        """Run id and monotonic time of the last answer."""
        self._version = Gauge("poise_learner_policy_version", "Current policy version.", registry=registry)
        self._batches = Counter(
            "poise_learner_batches",
            "Batches answered; duplicate is true if the answer was a stored one.",
            ["duplicate"],
            registry=registry,
        )
        self._rollouts = Counter("poise_learner_rollouts", "Rollouts trained on.", registry=registry)
        self._tokens = Counter("poise_learner_response_tokens", "Response tokens trained on.", registry=registry)
        self._rejected = Counter(
            "poise_learner_rejected_rollouts", "Rollouts rejected, by reason.", ["reason"], registry=registry
        )
        self._skipped = Counter(
            "poise_learner_skipped_updates",
            "Mini-batches skipped because loss or gradient was not finite.",
            registry=registry,
        )
        self._train = Histogram(
            "poise_learner_train_seconds", "Duration of a training step.", buckets=_SECONDS, registry=registry
        )
        self._publish = Histogram(
            "poise_learner_publish_seconds", "Duration of publishing a version.", buckets=_SECONDS, registry=registry
        )
        self._wait = Histogram(
            "poise_learner_wait_seconds",
            "Time between answering a batch and receiving the run's next one, excluding pauses.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._staleness = Histogram(
            "poise_learner_staleness_versions",
            "Staleness of rollouts trained on.",
            buckets=_STALENESS,
            registry=registry,
        )
        self._gauges = {
            name: Gauge(f"poise_learner_{metric}", text, registry=registry)
            for name, metric, text in (
                ("loss", "loss", "Policy loss of the last step."),
                ("entropy", "entropy_nats", "Mean entropy of the policy over the last step's tokens."),
                ("mismatch_logprob", "mismatch_logprob_nats", "Mean |learner - engine logprob| of the last step."),
                ("mismatch_kl", "mismatch_kl_nats", "KL(engine || learner) of the last step."),
                ("clip_share", "clip_ratio", "Share of the last step's tokens that were clipped."),
                ("clip_low_share", "clip_low_ratio", "Share of the last step's tokens clipped at the lower bound."),
                ("clip_high_share", "clip_high_ratio", "Share of the last step's tokens clipped at the upper bound."),
                ("dual_clip_share", "dual_clip_ratio", "Share of the last step's tokens clipped by the dual clip."),
                ("truncated_share", "truncated_ratio", "Share of the last step's tokens with a truncated weight."),
                ("gradient_norm", "gradient_norm", "Norm of the last step's gradient before clipping."),
                ("reference_kl", "reference_kl_nats", "KL(policy || reference) of the last step; 0 without one."),
                ("value_loss", "value_loss", "Critic loss of the last step; 0 without a critic."),
                (
                    "explained_variance",
                    "explained_variance_ratio",
                    "Share of the returns' variance that values explain.",
                ),
                ("critic_gradient_norm", "critic_gradient_norm", "Norm of the critic's gradient before clipping."),
                ("gradient_variance", "gradient_variance", "Variance of the gradient; 0 if not measured."),
                ("tokens_per_s", "tokens_per_second", "Model tokens per second of training in the last step."),
                ("mfu", "mfu_ratio", "Model FLOP/s utilization; 0 if unknown."),
            )
        }

    def recovered(self, policy_version: int) -> None:
        """Record the version that the service resumes from."""
        self._version.set(policy_version)

    def resumed(self) -> None:
        """Record the end of a pause, which does not count as waiting for rollouts."""
        self._answered = None

    def observe(self, result: StepResult, run_id: str, began_s: float) -> None:
        """Record an answered batch of a run, started at `began_s` on the monotonic clock."""
        previous, self._answered = self._answered, (run_id, time.monotonic())
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
        if previous is not None and previous[0] == run_id:
            self._wait.observe(max(0.0, began_s - previous[1]))
        for age, count in metrics.staleness.items():
            for _ in range(count):
                self._staleness.observe(age)
        for name, gauge in self._gauges.items():
            gauge.set(getattr(metrics, name))


@dataclass(frozen=True)
class ReplicaCollector(Collector):
    """Collects the state of the replicas at scrape time."""

    results: Callable[[], tuple[ReplicaResult, ...]]

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        current = GaugeMetricFamily(
            "poise_learner_replica_current", "1 if a replica serves the current version, else 0.", labels=["replica"]
        )
        version = GaugeMetricFamily(
            "poise_learner_replica_policy_version", "Last known version that a replica serves.", labels=["replica"]
        )
        for result in self.results():
            current.add_metric([result.address], float(result.current))
            version.add_metric([result.address], result.policy_version)
        yield from (current, version)
