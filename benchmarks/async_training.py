"""What does sampling ahead of the learner save, and does the policy learn as well?

Real runs of the `tiny` preset, each with services of its own: `max_staleness` 0 (each side waits for the other) against
1, for the same number of updates. Cases:

- `preset`: as it is. Sampling takes most of a step, so there is little to overlap.
- `balanced`: shorter responses, more updates a step, and a learner that saves memory (small micro-batches, gradient
  checkpointing), so that both sides take more nearly as long: where asynchrony gives most.
- `slow_environment`: answers take their time, as in a sandbox or before a judge, while no core is busy.

Generation and learner share this machine's cores, with the orchestrator and the queue besides: the ceiling, what
overlapping the two sides of the synchronous run perfectly would give, is not reached where there are only two.
Wall clock is taken from the runs' own metrics, without the start and without evaluations. Prints a table, writes
results/async_training.json, whose `speedup` is that of `balanced`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
NUM_WARM_STEPS = 2
"""Left out of the wall clock: the first steps pay for warming up."""
NUM_LAST_STEPS = 5
ANSWER_S = 0.05
"""The slow environment takes so long for an answer, in each of `WORKERS` processes."""
WORKERS = 4


def slow_exact(response: str, answer: str) -> float:
    """Compare, taking the time that a sandbox takes."""
    time.sleep(ANSWER_S)
    return float(response.strip() == answer)


@dataclass(frozen=True)
class Outcome:
    """What a run's own record says."""

    wall_s: float
    """Of the steps after the first few."""
    sampling_s: float
    """Of those, a step: until its journal was written."""
    learning_s: float
    """Of those, a step: publishing, training, and handing over the weights."""
    staleness: float
    first_reward: float
    last_reward: float
    held_out: float


def run(folder: Path, max_staleness: int, num_steps: int, settings: list[str]) -> Outcome:
    """Train, and read the record."""
    values = [
        f"run.dir={folder}",
        f"train.num_steps={num_steps}",
        f"max_staleness={max_staleness}",
        "train.evaluation.num_prompts=100",
        *settings,
    ]
    options = [part for value in values for part in ("--set", value)]
    program = "from poise.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "--preset", "tiny", *options]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = rows[NUM_WARM_STEPS:]

    def mean_s(*phases: str) -> float:
        return float(statistics.mean(sum(row["time_s"].get(phase, 0.0) for phase in phases) for row in timed))

    summary = json.loads((folder / "summary.json").read_text())
    return Outcome(
        wall_s=rows[-1]["wall_s"] - rows[NUM_WARM_STEPS - 1]["wall_s"],
        sampling_s=mean_s("generate", "verify", "baselines", "journal"),
        learning_s=mean_s("publish", "train", "weights"),
        staleness=statistics.mean(row["staleness"]["mean"] for row in timed),
        first_reward=statistics.mean(row["reward"]["mean"] for row in rows[:NUM_LAST_STEPS]),
        last_reward=statistics.mean(row["reward"]["mean"] for row in rows[-NUM_LAST_STEPS:]),
        held_out=summary["held_out"]["after"]["mean"],
    )


def slow_environment(folder: Path) -> list[str]:
    """Return the settings of the same problems, checked by `slow_exact`."""
    from poise.orchestrator.tasks.config import DigitsTask
    from poise.orchestrator.tasks.mixture import Mixture

    mixture = Mixture((DigitsTask(),), 0)
    paths = {}
    for name, problems in (("path", mixture.problems(0, 4000)), ("eval_path", mixture.held_out(200))):
        lines = {problem.key: json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems}
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("\n".join(lines.values()) + "\n")
    task = {"kind": "jsonl", "verifier": "async_training:slow_exact", "domain": "digits"}
    task |= {name: str(path) for name, path in paths.items()}
    return [f"train.tasks={json.dumps([task])}", f"train.verifier.num_workers={WORKERS}"]


def median(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the median of each figure."""
    names = Outcome.__dataclass_fields__
    return Outcome(**{name: statistics.median(getattr(one, name) for one in outcomes) for name in names})


def compared(synchronous: Outcome, asynchronous: Outcome) -> dict[str, float]:
    """Return what the second is worth beside the first."""
    sides = (synchronous.sampling_s, synchronous.learning_s)
    return {
        "speedup": round(synchronous.wall_s / asynchronous.wall_s, 3),
        "speedup_ceiling": round(sum(sides) / max(sides), 3),
        "synchronous_s": round(synchronous.wall_s, 2),
        "asynchronous_s": round(asynchronous.wall_s, 2),
        "mean_staleness": round(asynchronous.staleness, 3),
        "reward_first": round(asynchronous.first_reward, 3),
        "synchronous_reward_last": round(synchronous.last_reward, 3),
        "asynchronous_reward_last": round(asynchronous.last_reward, 3),
        "synchronous_held_out": round(synchronous.held_out, 3),
        "asynchronous_held_out": round(asynchronous.held_out, 3),
    }


CASES: dict[str, Callable[[Path], list[str]]] = {
    "preset": lambda _: [],
    "balanced": lambda _: [
        "train.sampling.max_tokens=2",
        "learner.mini_batch_prompts=8",
        "learner.micro_batch_tokens=48",
        "learner.gradient_checkpointing=true",
    ],
    "slow_environment": slow_environment,
}
COLUMNS = ("case", "ahead", "s", "sampling", "learning", "stale", "reward", "held out")


@click.command()
@click.option("--steps", default=16, show_default=True, help="Updates of each run.")
@click.option("--repeats", default=2, show_default=True, help="Runs of each kind, in turn.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=("preset", "balanced"))
def main(steps: int, repeats: int, cases: tuple[str, ...]) -> None:
    """Run, compare, write."""
    figures: dict[str, Any] = {"steps": steps, "repeats": repeats, "cores": os.cpu_count()}
    table = Table(title=f"{steps} updates, medians of {repeats}; sampling and learning in seconds a step")
    for column in COLUMNS:
        table.add_column(column)
    with tempfile.TemporaryDirectory(prefix="poise-benchmark-") as name:
        folder = Path(name)
        for case in cases:
            settings = CASES[case](folder)
            outcomes: dict[int, list[Outcome]] = {0: [], 1: []}
            for repeat in range(repeats):
                for max_staleness, found in outcomes.items():
                    found.append(run(folder / f"{case}-{max_staleness}-{repeat}", max_staleness, steps, settings))
            middle = {ahead: median(found) for ahead, found in outcomes.items()}
            for ahead, o in middle.items():
                numbers = (o.wall_s, o.sampling_s, o.learning_s, o.staleness)
                rewards = f"{o.first_reward:.2f} -> {o.last_reward:.2f}"
                table.add_row(case, str(ahead), *(f"{n:.2f}" for n in numbers), rewards, f"{o.held_out:.2f}")
            figures |= {f"{case}_{name}": value for name, value in compared(middle[0], middle[1]).items()}
            if case == "balanced":
                figures["speedup"] = figures["balanced_speedup"]
    console = Console()
    console.print(table)
    console.print({name: value for name, value in figures.items() if "speedup" in name})
    (HERE / "results/async_training.json").write_text(json.dumps({"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
