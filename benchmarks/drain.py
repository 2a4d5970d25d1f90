"""How long does a service take to stop under load, and does it lose accepted work?

Services of a tiny model, each in its own process, receive SIGTERM after a random time, several times:

- generation on the torch engine, with four callers: calls in flight at the signal;
- learner, within a step: the current batch, and the version of the restarted learner;
- value, with three callers that ask and publish: published labels that are in the durable state in the end.

Prints a table and writes results/drain.json.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from poise.local.models.catalog import make_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.integration.generation.draining import drain_under_load  # noqa: E402
from tests.integration.generation.test_process import run  # noqa: E402
from tests.integration.learner.draining import drain_within_a_step  # noqa: E402
from tests.integration.value.draining import drain_under_load as drain_value_under_load  # noqa: E402
from tests.support.tiny_models import make_tiny_llama  # noqa: E402

LIMIT_S = 120.0
"""drain_timeout_s of generation in the chart. Kubernetes waits half a minute longer."""

T = TypeVar("T")


def several(rounds: int, drain: Callable[[Path], Coroutine[Any, Any, T]]) -> list[T]:
    """Drain `rounds` times, each in a new folder, and return the outcomes."""
    outcomes = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="poise-benchmark-") as folder:
            outcomes.append(asyncio.run(drain(Path(folder))))
    return outcomes


def times(drains_s: list[float]) -> dict[str, float]:
    return {"median_drain_s": statistics.median(drains_s), "longest_drain_s": max(drains_s)}


@click.command()
@click.option("--rounds", default=10, show_default=True, help="Drains of generation.")
@click.option("--other-rounds", default=3, show_default=True, help="Drains of the learner, and of the value service.")
@click.option("--max-tokens", default=100, show_default=True, help="Maximum response tokens.")
def main(rounds: int, other_rounds: int, max_tokens: int) -> None:
    """Drain services under load and count lost work."""
    source = random.Random(0)
    settings = (f"model={make_model('tiny')}", f"drain_timeout_s={LIMIT_S}")
    command = ["poise.generation", *(part for one in settings for part in ("--set", one))]

    async def drain_generation(folder: Path) -> Any:
        with run(folder / "run", *command) as process:
            await asyncio.to_thread(process.wait_until_ready)
            return await drain_under_load(process, max_tokens, source.uniform(0.3, 2.0))

    generation = several(rounds, drain_generation)
    learner = several(other_rounds, lambda folder: drain_within_a_step(make_tiny_llama(folder / "model"), folder))
    value = several(other_rounds, lambda folder: drain_value_under_load(folder, source.uniform(0.3, 1.5)))
    figures = {
        "generation": {
            "rounds": rounds,
            "rollouts_accepted": sum(outcome.accepted for outcome in generation),
            "calls_in_flight": sum(outcome.calls_in_flight for outcome in generation),
            "calls_finished_whole": sum(outcome.whole_calls for outcome in generation),
            "calls_lost": sum(outcome.broken_calls for outcome in generation),
            **times([outcome.drain_s for outcome in generation]),
            "limit_s": LIMIT_S,
        },
        "learner": {
            "rounds": other_rounds,
            "steps_lost": sum((outcome.policy_version, outcome.version_after) != (1, 1) for outcome in learner),
            **times([outcome.drain_s for outcome in learner]),
        },
        "value": {
            "rounds": other_rounds,
            "labels_published": sum(len(outcome.published) for outcome in value),
            "labels_lost": sum(len(outcome.lost) for outcome in value),
            "labels_doubled": sum(len(outcome.doubled) for outcome in value),
            **times([outcome.drain_s for outcome in value]),
        },
    }
    table = Table(title="SIGTERM under load", show_header=False)
    for service, numbers in figures.items():
        for name, number in numbers.items():
            shown = f"{number:.2f}" if isinstance(number, float) else str(number)
            table.add_row(service, name.replace("_", " "), shown)
    Console().print(table)
    path = HERE / "results/drain.json"
    path.write_text(json.dumps({"figures": figures, "rounds": [asdict(one) for one in generation]}, indent=1) + "\n")
    lost = [name for numbers in figures.values() for name, number in numbers.items() if "lost" in name and number]
    if lost:
        raise SystemExit(f"accepted work was lost: {', '.join(lost)}")


if __name__ == "__main__":
    main()
