"""Is work lost or doubled when generation replicas die, join and drain during a run?

Runs a tiny model on three replicas of the torch engine, each in its own process. One is killed with unfinished
rollouts, one is added, and one is drained; then the run continues to its end.
tests/integration/orchestrator/test_elastic_generation.py runs the same scenario. Prints a table and writes
results/elastic_generation.json.
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
