"""The metrics of the value service.

Counters that the state contains are read from it at scrape time, so they survive a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from poise.queue.interface import QueueDepth
from poise.value.state import ValueState

_LAG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ValueMetrics:
    """Metrics that are updated when something happens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.fit_seconds = Histogram(
            "poise_value_fit_seconds",
            "Time to fit a domain's estimator.",
            ["domain"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.fit_failures = Counter(
            "poise_value_fit_failures",
            "Failed fits. The domain's current estimator continues to answer.",
            ["domain"],
            registry=registry,
        )
        self.label_lag = Histogram(
            "poise_value_label_lag_seconds",
            "Time from publishing a labelled group to saving it.",
            ["domain"],
            buckets=_LAG_SECONDS,
            registry=registry,
        )
        self.state_write_seconds = Histogram(
            "poise_value_state_write_seconds",
            "Time to save the state.",
            buckets=_SECONDS,
            registry=registry,
        )


@dataclass(frozen=True)
class StateCollector(Collector):
    """Metrics that are read from the state at scrape time."""

    state: ValueState
    depth: Callable[[], QueueDepth]

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        yield CounterMetricFamily(
            "poise_value_groups_consumed",
            "Labelled groups learnt since the state was created, without duplicates.",
            self.state.num_groups_consumed,
        )
        yield CounterMetricFamily(
            "poise_value_group_duplicates",
            "Labelled groups that were delivered again and ignored.",
            self.state.num_duplicates,
        )
        depth = self.depth()
        yield CounterMetricFamily(
            "poise_value_dead_letters",
            "Queue entries that could not be learnt and went to the dead letters.",
            depth.num_dead_letters,
        )
        yield CounterMetricFamily(
            "poise_value_queue_losses",
            "Times that published labels were missing from the queue since the process started.",
            depth.num_losses,
        )
        yield GaugeMetricFamily(
            "poise_value_groups_pending", "Groups that are published and not saved yet.", depth.num_entries
        )
        yield from self._by_domain()

    def _by_domain(self) -> Iterator[Metric]:
        estimated = CounterMetricFamily(
            "poise_value_estimated_rows", "Rollouts whose value was predicted.", labels=["domain"]
        )
        rows = GaugeMetricFamily("poise_value_window_rows", "Rollouts in the sliding window.", labels=["domain"])
        version = GaugeMetricFamily(
            "poise_value_probe_version", "Version of the current estimator; 0 before the first fit.", labels=["domain"]
        )
        qualities = {
            name: GaugeMetricFamily(f"poise_value_{name}", text, labels=["domain"]) for name, text in _QUALITIES.items()
        }
        bins = {
            field: GaugeMetricFamily(f"poise_value_calibration_{name}", text, labels=["domain", "tenth"])
            for field, (name, text) in _CALIBRATION.items()
        }
        errors = GaugeMetricFamily(
            "poise_value_estimator_error",
            "Mean squared difference of reward and baseline, weighted by squared score norms, on steps predicted from "
            "earlier ones.",
            labels=["domain", "estimator"],
        )
        current = GaugeMetricFamily(
            "poise_value_estimator", "1 for the estimator that answers now.", labels=["domain", "estimator"]
        )
        for name, domain in self.state.domains.items():
            probe = self.state.probes.get(name)
            estimated.add_metric([name], domain.num_estimated_rows)
            rows.add_metric([name], domain.window.num_rows)
            version.add_metric([name], probe.version if probe else 0)
            if probe is not None:
                current.add_metric([name, probe.probe.estimator], 1)
                for estimator, error in probe.probe.errors.items():
                    errors.add_metric([name, estimator], error)
            quality = domain.diagnostics.quality()
            for field, family in qualities.items():
                family.add_metric([name], getattr(quality, field))
            for one in quality.calibration:
                tenth = str(min(int(one.predicted * 10), 9))
                for field, family in bins.items():
                    family.add_metric([name, tenth], getattr(one, field))
        yield from (estimated, rows, version, current, errors, *qualities.values(), *bins.values())


_QUALITIES = {
    "pearson": "Correlation of value and reward, over rollouts predicted before their labels were learnt. A probe "
    "predicts the mean reward of the siblings, a score-weighted estimator the rollout's own.",
    "brier": "Mean squared difference of value and reward, over rollouts predicted before their labels were learnt.",
    "brier_skill": "1 - brier / brier of a constant prediction of the mean. Below 0, the constant is better.",
    "bias": "Mean of value - reward, over rollouts predicted before their labels were learnt.",
    "share_clipped": "Share of values clipped to 0 or 1, over rollouts predicted before their labels were learnt.",
    "variance_vs_none": "Mean squared advantage relative to that without a baseline.",
    "variance_vs_rloo": "Mean squared advantage relative to that with the siblings' mean reward as baseline.",
    "variance_vs_batch_mean": "Mean squared advantage relative to that with the other prompts' mean reward as "
    "baseline.",
    "weighted_variance_vs_none": "Mean squared advantage relative to that without a baseline, both weighted by squared "
    "score norms. NaN for the probe.",
    "weighted_variance_vs_batch_mean": "Mean squared advantage relative to that with the other prompts' mean reward as "
    "baseline, both weighted by squared score norms. NaN for the probe.",
}
"""Fields of `ProbeQuality`."""

_CALIBRATION = {
    "predicted": (
        "predicted",
        "Mean value of the rollouts whose value is in this tenth of [0, 1]; tenths count from 0.",
    ),
    "realised": (
        "realised",
        "Mean reward of the rollouts whose value is in this tenth; for the probe, of their siblings.",
    ),
    "count": ("rows", "Number of rollouts whose value is in this tenth."),
}
"""Name and help by field of `CalibrationBin`."""
