"""Is every label learnt exactly once, however often and whenever the value service and Valkey are killed?

Publishes labels in rounds. In each, `kill -9` ends the value service, Valkey or both, a random moment after the
service began to publish, consume, fit or save. In the end the state on disk is compared with the published labels.
Prints a table and writes results/value_chaos.json, or results/value_chaos_ESTIMATOR.json with another estimator than
the probe.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from poise_client.types import Estimator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.integration.value.chaos import PHASES, VICTIMS, WIDTH, run_chaos  # noqa: E402


@click.command()
@click.option("--rounds", default=50, show_default=True, help="Number of rounds with a kill.")
@click.option("--seed", default=0, show_default=True, help="Seed of victims and moments.")
@click.option("--estimator", default="probe", show_default=True, type=click.Choice(get_args(Estimator)))
def main(rounds: int, seed: int, estimator: Estimator) -> None:
    """Kill services at random moments and count the labels."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="poise-benchmark-") as folder:
        outcome = asyncio.run(run_chaos(Path(folder), rounds, seed, estimator))
    figures = {
        "rounds": rounds,
        **{f"kills_of_{victim}": outcome.kills[victim] for victim in VICTIMS},
        **{f"kills_during_{phase}": outcome.hits[phase] for phase in PHASES},
        "kills_during_none_of_these": outcome.hits["idle"],
        "width": WIDTH,
        "messages_published_again": outcome.num_retries,
        "labels_published": len(outcome.published),
        "labels_in_the_state": sum(outcome.learnt.values()),
        "labels_lost": len(outcome.lost),
        "labels_doubled": len(outcome.doubled),
        "copies_recognised": outcome.num_duplicates,
        "fits": outcome.num_fits,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    table = Table(title="labels over kill -9", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
    path = HERE / "results" / ("value_chaos.json" if estimator == "probe" else f"value_chaos_{estimator}.json")
    path.write_text(json.dumps({"figures": figures, "seed": seed, "estimator": estimator}, indent=2) + "\n")
    if outcome.lost or outcome.doubled:
        raise SystemExit("labels were lost or doubled")


if __name__ == "__main__":
    main()
