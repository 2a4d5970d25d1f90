"""Generation replicas that come and go while a run is driven: is the work shared, and is anything lost or doubled?

A run of a tiny model on three replicas of the torch engine, each a process of its own: one is killed with work in hand,
one is added, one is told to stop with work in hand; then the run goes on to its end. It is the scenario of
tests/integration/orchestrator/test_elastic_generation.py. Prints a table, writes results/elastic_generation.json.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.integration.orchestrator.elastic import drive_elastic_run  # noqa: E402


def main() -> None:
    """Drive, count, write."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(drive_elastic_run(Path(folder)))
    figures = {
        "steps": outcome.num_steps,
        "rollouts_expected": outcome.num_expected,
        "rollouts_trained_on": outcome.num_trained,
        "rollouts_lost": outcome.num_lost,
        "rollouts_doubled": outcome.num_doubled,
        "rollouts_rejected": outcome.num_rejected,
        "exit_status_of_the_drained": outcome.drained_status,
        "share_of_tokens": outcome.shares,
    }
    table = Table("replica", *outcome.shares, title="Share of response tokens")
    for name in ("killed", "drained", "steady", "added"):
        table.add_row(name, *(f"{shares.get(name, 0):.1%}" for shares in outcome.shares.values()))
    console = Console()
    console.print(table)
    for name in ("steps", "rollouts_expected", "rollouts_trained_on", "rollouts_lost", "rollouts_doubled"):
        console.print(f"{name.replace('_', ' ')}: {figures[name]}", highlight=False)
    (HERE / "results/elastic_generation.json").write_text(json.dumps({"figures": figures}, indent=1) + "\n")
    if outcome.num_lost or outcome.num_doubled or outcome.num_trained != outcome.num_expected:
        raise SystemExit("rollouts were lost or doubled")


if __name__ == "__main__":
    main()
