"""How much time does sampling one step ahead save, and does the policy learn as well?

Runs the `tiny` preset with its own services, once with `max_staleness` 0 and once with 1, for the same number of
updates:

- `preset`: unchanged. Sampling takes most of a step, so little can overlap.
- `balanced`: shorter responses, more updates a step, and a learner that saves memory (small micro-batches, gradient
  checkpointing). Both sides take about equally long, where asynchrony gains most.
- `slow_environment`: the verifier takes its time, like a sandbox or a judge, while no core is busy.

Generation, learner, orchestrator and queue share this machine's cores, so two cores cannot reach perfect overlap.
Wall clock comes from the runs' own metrics, without start and evaluations. Prints a table and writes
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
"""First steps, excluded from the wall clock because they warm up."""
NUM_LAST_STEPS = 5
ANSWER_S = 0.05
"""Seconds that the slow environment takes for an answer, in each of `WORKERS` processes."""
WORKERS = 4


def slow_exact(response: str, answer: str) -> float:
    """Compare after the delay of a sandbox."""
    time.sleep(ANSWER_S)
    return float(response.strip() == answer)


@dataclass(frozen=True)
class Outcome:
    """Numbers from a run's own record."""

    wall_s: float
    """Of the steps after the warm-up."""
    sampling_s: float
    """Mean of a step, until its journal is written."""
    learning_s: float
    """Mean of a step: publishing, training, pushing weights."""
    staleness: float
    first_reward: float
    last_reward: float
    held_out: float


def run(folder: Path, max_staleness: int, num_steps: int, settings: list[str]) -> Outcome:
    """Train, and return the numbers of the run."""
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
    """Return settings for the same problems with the verifier `slow_exact`."""
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
    """Return the figures of the asynchronous run relative to the synchronous one."""
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
@click.option("--repeats", default=2, show_default=True, help="Runs of each kind, in turns.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=("preset", "balanced"))
def main(steps: int, repeats: int, cases: tuple[str, ...]) -> None:
    """Measure what sampling one step ahead saves."""
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
