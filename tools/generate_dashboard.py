"""Generate helm/poise/files/dashboard.json, the Grafana dashboard, from the panels below.

generate_dashboard.py           write the dashboard
generate_dashboard.py --check   fail if it is out of date
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "helm" / "poise" / "files" / "dashboard.json"
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


@dataclass(frozen=True)
class Panel:
    """One panel with time series."""

    title: str
    unit: str
    about: str
    queries: tuple[tuple[str, str], ...]
    """PromQL, and the legend of its series."""


ROWS: dict[str, tuple[Panel, ...]] = {
    "Is it learning?": (
        Panel(
            "Brier skill of the probe",
            "none",
            "1 - squared error / squared error of the domain's mean. Below 0 a constant predicts better.",
            (("poise_value_brier_skill", "{{domain}}"),),
        ),
        Panel(
            "Variance of the advantages",
            "percentunit",
            "Mean squared advantage with the probe, relative to that with the siblings' mean reward.",
            (("poise_value_variance_vs_rloo", "{{domain}}"),),
        ),
        Panel("Entropy", "none", "Nats a token in the last step.", (("poise_learner_entropy_nats", "entropy"),)),
    ),
    "Is it trustworthy?": (
        Panel(
            "Difference of engine and learner",
            "none",
            "Nats a token, on the same tokens. The importance weights correct for it.",
            (
                ("poise_learner_mismatch_logprob_nats", "mean |difference|"),
                ("poise_learner_mismatch_kl_nats", "KL"),
            ),
        ),
        Panel(
            "Gradient norm",
            "none",
            "Before clipping, in the last step.",
            (("poise_learner_gradient_norm", "norm"),),
        ),
        Panel(
            "Clipped and truncated",
            "percentunit",
            "Share of the last step's tokens.",
            (
                ("poise_learner_clip_low_ratio", "lower bound"),
                ("poise_learner_clip_high_ratio", "upper bound"),
                ("poise_learner_truncated_ratio", "weight truncated"),
            ),
        ),
    ),
    "Is a service waiting?": (
        Panel(
            "Where the learner's time goes",
            "percentunit",
            "The rest is waiting for rollouts.",
            (
                ("rate(poise_learner_train_seconds_sum[5m])", "training"),
                ("rate(poise_learner_publish_seconds_sum[5m])", "pushing weights"),
            ),
        ),
        Panel(
            "Rollouts in generation",
            "none",
            "",
            (
                ("sum(poise_generation_running_rollouts)", "running"),
                ("sum(poise_generation_accepted_rollouts)", "accepted, not finished"),
            ),
        ),
        Panel(
            "Response tokens a second",
            "none",
            "",
            (
                ("sum(rate(poise_generation_response_tokens_total[5m]))", "sampled"),
                ("sum(rate(poise_learner_response_tokens_total[5m]))", "trained on"),
            ),
        ),
    ),
    "Do weights and labels arrive?": (
        Panel(
            "Versions",
            "none",
            "Version of the learner, and the version that each replica serves.",
            (
                ("poise_learner_policy_version", "learner"),
                ("poise_learner_replica_policy_version", "{{replica}}"),
            ),
        ),
        Panel(
            "Sampling pauses for new weights",
            "s",
            "Mean over pushes.",
            (
                (
                    "rate(poise_generation_weights_pause_seconds_sum[5m])"
                    " / rate(poise_generation_weights_pause_seconds_count[5m])",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Staleness, versions",
            "none",
            "Mean over the rollouts trained on.",
            (
                (
                    "rate(poise_learner_staleness_versions_sum[5m]) / rate(poise_learner_staleness_versions_count[5m])",
                    "mean",
                ),
            ),
        ),
        Panel("Labels queued", "none", "Groups.", (("poise_value_groups_pending", "pending"),)),
        Panel(
            "Label lag",
            "s",
            "90th percentile of the time from publishing a label to its being durable.",
            (
                (
                    "histogram_quantile(0.9, sum by (domain, le) (rate(poise_value_label_lag_seconds_bucket[5m])))",
                    "{{domain}}",
                ),
            ),
        ),
        Panel(
            "Fits of the probe",
            "s",
            "Mean duration.",
            (
                (
                    "rate(poise_value_fit_seconds_sum[5m]) / rate(poise_value_fit_seconds_count[5m])",
                    "{{domain}}",
                ),
            ),
        ),
    ),
}


SCOPE = '{namespace=~"$namespace", release=~"$release"}'
"""Selector of the dashboard's variables, added to every metric."""


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, of_row in ROWS.items():
        panels.append({"type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for index, panel in enumerate(of_row):
            place = {"x": index % COLUMNS * WIDTH, "y": y + index // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(panel, place))
        y += -(-len(of_row) // COLUMNS) * HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "title": "POISE",
        "uid": "poise",
        "schemaVersion": 39,
        "tags": ["poise"],
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
                _variable("namespace", "{}"),
                _variable("release", '{namespace=~"$namespace"}'),
            ]
        },
        "panels": panels,
    }


def _variable(name: str, among: str) -> dict[str, Any]:
    """Return a variable over the values of a label of the learner's metrics, with All selected."""
    return {
        "name": name,
        "type": "query",
        "label": name.title(),
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values(poise_learner_policy_version{among}, {name})",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "expr": re.sub(r"\bpoise_\w+", lambda metric: metric[0] + SCOPE, expression),
                "legendFormat": name,
            }
            for index, (expression, name) in enumerate(panel.queries)
        ],
    }


def main() -> int:
    """Write the file, or with --check fail if it is out of date."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text:
            print(f"{TARGET} is out of date: run `make chart`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
