"""Prometheus metrics of the generation service."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from poise_client.types import Group

_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_SECOND_BUCKETS = (0.01, 0.05, 0.2, 1, 5, 20, 60, 300, 1800)


class GenerationMetrics:
    """The metrics of one service, on its own registry."""

    def __init__(self, registry: CollectorRegistry, num_running: Callable[[], int], num_accepted: Callable[[], int]):
        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"poise_generation_{name}_seconds", text, buckets=_SECOND_BUCKETS, registry=registry)

        self._loaded = Gauge("poise_generation_loaded", "1 once the model is loaded; 0 before.", registry=registry)
        self._rollouts = Counter(
            "poise_generation_rollouts", "Finished rollouts, by finish reason.", ["finish_reason"], registry=registry
        )
        self._tokens = Counter("poise_generation_response_tokens", "Response tokens sampled.", registry=registry)
        self._length = Histogram(
            "poise_generation_response_length_tokens",
            "Response tokens per rollout.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._first_token = seconds("first_token", "Time from entering the engine to the first token.")
        self._rollout_seconds = seconds("rollout", "Time from entering the engine to the last token.")
        self._version = Gauge("poise_generation_policy_version", "Policy version served.", registry=registry)
        self._receive = seconds("weights_receive", "Time to receive and check a push.")
        self._pause = seconds("weights_pause", "Time for which a push paused generation.")
        running = Gauge("poise_generation_running_rollouts", "Rollouts in the engine now.", registry=registry)
        running.set_function(num_running)
        accepted = Gauge(
            "poise_generation_accepted_rollouts", "Rollouts accepted and not yet finished.", registry=registry
        )
        accepted.set_function(num_accepted)

    def loaded(self) -> None:
        """Record that the model is loaded."""
        self._loaded.set(1)

    def observe(self, group: Group) -> None:
        """Record a finished group."""
        for rollout in group.rollouts:
            self._rollouts.labels(finish_reason=rollout.finish_reason).inc()
            self._tokens.inc(rollout.token_ids.size)
            self._length.observe(rollout.token_ids.size)
            self._first_token.observe(rollout.first_token_s)
            self._rollout_seconds.observe(rollout.total_s)

    def weights_applied(self, policy_version: int, receive_s: float, pause_s: float) -> None:
        """Record an applied push."""
        self._version.set(policy_version)
        self._receive.observe(receive_s)
        self._pause.observe(pause_s)
