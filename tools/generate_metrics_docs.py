"""Generate docs/reference/metrics.md: every metric of every service, read from its registry.

generate_metrics_docs.py           write the page
generate_metrics_docs.py --check   fail if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from poise.generation.app import build as build_generation
from poise.generation.config import GenerationConfig
from poise.learner.app import build as build_learner
from poise.learner.config import LearnerConfig
from poise.queue.interface import QueueDepth
from poise.runtime.network.auth import BearerAuth
from poise.runtime.rpc.interceptors import ServiceInterceptor
from poise.value.app import build as build_value
from poise.value.config import ValueConfig
from poise.value.metrics import StateCollector
from poise.value.state import ValueState

TARGET = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"

HEAD = """# Metrics

Every service serves these at `GET /metrics` on its admin port. This page is generated from the code by `make chart`.
A histogram has the series `_bucket`, `_sum` and `_count`. The [runbook](../how_to/runbook.md) explains the alerts on
these metrics; [Observe a run](../how_to/observe.md) shows the dashboard.
"""


def registries() -> dict[str, CollectorRegistry]:
    """Return the registry of each service, without starting any."""
    nowhere = Path("/nonexistent")
    value_config = ValueConfig(state_dir=nowhere)
    found = {
        "generation": build_generation(GenerationConfig(model="model", engine="torch")).registry,
        "value": build_value(value_config).registry,
        "learner": build_learner(LearnerConfig(model="model", state_dir=nowhere)).registry,
    }
    found["value"].register(StateCollector(ValueState(value_config), lambda: QueueDepth(0, 0)))
    for name, registry in found.items():
        ServiceInterceptor(name, BearerAuth(None), registry, 1)
    return found


def rows(registry: CollectorRegistry) -> list[tuple[str, str, str, str]]:
    """Return name, type, labels and help of each metric, sorted by name."""
    found = set()
    collectors: list[Collector] = list(registry._collector_to_names)
    for collector in collectors:
        own_labels = getattr(collector, "_labelnames", ())
        for family in collector.collect():
            if family.name.startswith("poise_"):
                labels = own_labels or getattr(family, "_labelnames", ())
                name = f"{family.name}_total" if family.type == "counter" else family.name
                found.add((name, family.type, ", ".join(labels), family.documentation.replace("|", "\\|")))
    return sorted(found)


def document() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for service, registry in registries().items():
        parts.append(f"\n## {service}\n\n| metric | type | labels | |\n|---|---|---|---|\n")
        parts += [f"| `{name}` | {kind} | {labels} | {about} |\n" for name, kind, labels, about in rows(registry)]
    return "".join(parts)


def main() -> int:
    """Write the page, or with --check fail if it is out of date."""
    text = document()
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text:
            print(f"{TARGET} is out of date: run `make chart`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
