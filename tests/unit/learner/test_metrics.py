"""The learner's metrics of its own time."""

from __future__ import annotations

import dataclasses
import time

import pytest
from prometheus_client import CollectorRegistry

from poise.learner.metrics import LearnerMetrics
from poise_client.types import StepMetrics, StepResult

RESULT = StepResult(1, False, dataclasses.replace(StepMetrics(), num_rollouts=2, train_s=4.0, publish_s=1.0), (), ())


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)

    def step(self, metrics: LearnerMetrics, wait_s: float, run_id: str = "run", took_s: float = 5.0) -> None:
        began_s = self.now_s + wait_s
        self.now_s = began_s + took_s
        metrics.observe(RESULT, run_id, began_s)


def waited(registry: CollectorRegistry) -> tuple[float | None, float | None]:
    return tuple(registry.get_sample_value(f"poise_learner_wait_seconds_{part}") for part in ("sum", "count"))  # type: ignore[return-value]


def test_waiting_is_counted_only_within_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, clock = CollectorRegistry(), Clock(monkeypatch)
    metrics = LearnerMetrics(registry, lambda: False)
    clock.step(metrics, 60.0)  # no previous batch
    assert waited(registry) == (0, 0)
    clock.step(metrics, 3.0)
    clock.step(metrics, 4.0)
    assert waited(registry) == (7.0, 2)
    clock.step(metrics, 9000.0, "another run")
    assert waited(registry) == (7.0, 2)


def test_pause_does_not_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, clock = CollectorRegistry(), Clock(monkeypatch)
    metrics = LearnerMetrics(registry, lambda: False)
    clock.step(metrics, 0.0)
    metrics.resumed()
    clock.step(metrics, 500.0)
    clock.step(metrics, 2.0)
    assert waited(registry) == (2.0, 1)


def test_metric_shows_that_training_is_stopped() -> None:
    registry, stopped = CollectorRegistry(), [False]
    LearnerMetrics(registry, lambda: stopped[0])
    for state in (False, True, False):
        stopped[0] = state
        assert registry.get_sample_value("poise_learner_training_stopped") == state
