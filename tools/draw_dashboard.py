"""Draw docs/figures/dashboard.png: the dashboard's queries, answered by a Prometheus that scraped a run.

Trains the tiny preset in a temporary folder for a minute or two. Needs `make .venv/.prometheus`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.chart.monitoring import DASHBOARD, Prometheus, filled_in  # noqa: E402

from poise.local.run_file import load_run, preset_path  # noqa: E402

ADDRESS = "127.0.0.1:19090"
SERVICES = ("generation", "value", "learner")


def query_range(expression: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
    """Return the series of a query over time."""
    asked = {"query": expression, "start": start_s, "end": end_s, "step": "1s"}
    with urllib.request.urlopen(f"http://{ADDRESS}/api/v1/query_range?{urllib.parse.urlencode(asked)}") as answer:
        lines: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return lines


def named(legend: str, labels: dict[str, str]) -> str:
    """Return a legend with its labels filled in, as Grafana does."""
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return legend


def draw(start_s: float, end_s: float) -> None:
    """Query every panel and draw them."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if "targets" in panel]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(15, 3 * -(-len(panels) // 3)), layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=True):
        axis.set_title(panel["title"], fontsize=10)
        axis.grid(alpha=0.3)
        for target in panel["targets"]:
            for line in query_range(filled_in(target["expr"]), start_s, end_s):
                points = [(float(at) - start_s, float(value)) for at, value in line["values"]]
                axis.plot(*zip(*points, strict=True), label=named(target["legendFormat"], line["metric"]))
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    path = ROOT / "docs" / "figures" / "dashboard.png"
    figure.savefig(path, dpi=80)
    print(path)


def main() -> None:
    """Train, scrape and draw."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [f"run.dir={scratch}/run", "train.evaluation.num_prompts=0"]
        run = load_run(preset_path("tiny"), overrides)
        prometheus = Prometheus(
            Path(scratch) / "prometheus", ADDRESS, {f"poise-{name}": run.admin_address(name) for name in SERVICES}
        )
        try:
            started_s = time.time()
            flags = [part for override in overrides for part in ("--set", override)]
            poise = str(Path(sys.executable).with_name("poise"))
            subprocess.run([poise, "run", "--preset", "tiny", *flags], check=True)
            draw(started_s, time.time())
        finally:
            prometheus.stop()


if __name__ == "__main__":
    main()
