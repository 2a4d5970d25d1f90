"""How long does a generation replica take to end under load, and is anything lost that it had accepted?

The tiny model on the torch engine in a process of its own, four callers that ask again and again; SIGTERM after a
random time, ten times over. Prints a table, writes results/drain.json.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from poise.local.models import make_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.integration.generation.draining import drain_under_load  # noqa: E402
from tests.integration.generation.test_process import run  # noqa: E402

LIMIT_S = 120.0
"""drain_timeout_s, as the chart sets it; Kubernetes gives half a minute more."""


@click.command()
@click.option("--rounds", default=10, show_default=True, help="Drains.")
@click.option("--max-tokens", default=100, show_default=True, help="Longest response.")
def main(rounds: int, max_tokens: int) -> None:
    """Drain, count, write."""
    source, outcomes = random.Random(0), []
    settings = (f"model={make_model('tiny')}", f"drain_timeout_s={LIMIT_S}")
    command = [sys.executable, "-m", "poise.generation", *(part for one in settings for part in ("--set", one))]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, run(Path(folder) / "run", *command) as process:
            process.wait_until_ready()
            outcomes.append(asyncio.run(drain_under_load(process, max_tokens, source.uniform(0.3, 2.0))))
    figures = {
        "rounds": rounds,
        "rollouts_accepted": sum(outcome.accepted for outcome in outcomes),
        "calls_in_flight": sum(outcome.calls_in_flight for outcome in outcomes),
        "calls_finished_whole": sum(outcome.whole_calls for outcome in outcomes),
        "calls_lost": sum(outcome.broken_calls for outcome in outcomes),
        "median_drain_s": statistics.median(outcome.drain_s for outcome in outcomes),
        "longest_drain_s": max(outcome.drain_s for outcome in outcomes),
        "limit_s": LIMIT_S,
    }
    table = Table(title="SIGTERM under load", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
    path = HERE / "results/drain.json"
    path.write_text(json.dumps({"figures": figures, "rounds": [asdict(one) for one in outcomes]}, indent=1) + "\n")
    if figures["calls_lost"]:
        raise SystemExit("accepted calls were lost")


if __name__ == "__main__":
    main()
