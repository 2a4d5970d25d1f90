"""How many tokens and seconds do POISE and TRL's GRPOTrainer need to reach the same held-out reward?

Model, prompts, reward rule, learning rate, warm-up, rollouts an update, budget of response tokens and machine are the
same; they run one after the other. POISE runs as `poise run`, with its services. TRL runs in its own environment with
its own defaults (groups of 8, its DAPO loss, transformers' generate), except that gradient checkpointing and
bfloat16, which would only slow it down here, are off. Held-out prompts are evaluated each time the tokens pass a part
of the budget. Evaluations and start-up are excluded. Prints a table and writes results/versus_trl.json.

`make .venv-trl/.done` installs TRL. Takes seventeen minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from poise.local.models.catalog import make_model
from poise.local.run_file import LocalRun, load_run, preset_path
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.report.comparison.arithmetic import Curve, common_levels, crossing, make_curve

HERE = Path(__file__).parent
TRL = HERE.parent / ".venv-trl" / "bin" / "python"
GROUP = 8
"""TRL's default of `num_generations`."""
THREADS = 2


@dataclass(frozen=True)
class Side:
    """Held-out reward of one side by tokens and by seconds."""

    by_tokens: Curve
    by_seconds: Curve
    tokens: float
    seconds: float


def side(lines: Sequence[dict[str, Any]]) -> Side:
    rewards = [float(np.mean([np.mean(each) for each in line["rewards"]])) for line in lines]
    tokens, seconds = [line["tokens"] for line in lines], [line["wall_s"] for line in lines]
    return Side(
        make_curve(zip(tokens, rewards, strict=True)),
        make_curve(zip(seconds, rewards, strict=True)),
        max(tokens),
        max(seconds),
    )


def run_poise(options: list[str], run: LocalRun) -> Side:
    command = [sys.executable, "-c", "from poise.cli import main; main()", "run", *options]
    subprocess.run(command, check=True)
    return side([json.loads(line) for line in (run.dir / "evaluations.jsonl").read_text().splitlines()])


def as_records(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    if others := {problem.verifier for problem in problems} - {"exact"}:
        raise click.ClickException(f"only the verifier `exact` is the same rule on both sides, not {', '.join(others)}")
    return [
        {"prompt": p.prompt if isinstance(p.prompt, str) else [dict(m) for m in p.prompt], "answer": p.answer}
        for p in problems
    ]


def run_trl(run: LocalRun, folder: Path, budget: int, every: int) -> Side:
    train, mixture = run.train, Mixture(run.train.tasks, run.train.seed)
    num_rollouts = train.prompts_per_step * train.group_size
    num_prompts = num_rollouts // GROUP
    num_steps = 2 + budget // num_rollouts  # a response has at least one token
    spec = {
        "model": run.learner.model,
        "folder": str(folder / "trl"),
        "output": str(folder / "trl.jsonl"),
        "training": as_records([p for step in range(num_steps) for p in mixture.problems(step, num_prompts)]),
        "held_out": as_records(mixture.held_out(train.evaluation.num_prompts)),
        "held_out_batch": 64,
        "rollouts_per_prompt": train.evaluation.rollouts_per_prompt,
        "rollouts_per_step": num_rollouts,
        "max_tokens": train.sampling.max_tokens,
        "learning_rate": run.learner.optimizer.learning_rate,
        "warmup_steps": run.learner.optimizer.warmup_updates,
        "budget_tokens": budget,
        "every_tokens": every,
        "threads": THREADS,
        "seed": train.seed,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    environment = {"PYTHONPATH": str(HERE.parent / "services"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [str(TRL), str(HERE / "versus_trl_trainer.py"), str(folder / "spec.json")]
    subprocess.run(command, check=True, env=environment)
    return side([json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()])


def at(curve: Curve, level: float) -> float:
    found = crossing(curve, level)
    assert found is not None, "both sides reach a common level"
    return found


@click.command()
@click.option("--preset", default="smollm2", show_default=True, help="The run of both sides.")
@click.option("--tokens", default=3000, show_default=True, help="Response tokens sampled for training on each side.")
@click.option("--evaluations", default=5, show_default=True, help="Evaluations within the budget.")
@click.option("--seed", default=0, show_default=True, help="Seed of prompts and sampling.")
def main(preset: str, tokens: int, evaluations: int, seed: int) -> None:
    if not TRL.exists():
        raise click.ClickException("TRL is not set up: make .venv-trl/.done")
    every = tokens // evaluations
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            f"run.dir={folder}/poise",
            f"seed={seed}",
            "train.num_steps=10000",
            f"train.budget.tokens={tokens}",
            f"train.evaluation.every_tokens={every}",
        ]
        run = load_run(preset_path(preset), settings)
        make_model(run.model)
        options = ["--preset", preset, *(part for value in settings for part in ("--set", value))]
        trl = run_trl(run, folder, tokens, every)
        poise = run_poise(options, run)
    levels = common_levels([poise.by_tokens, trl.by_tokens])
    if not levels:
        raise click.ClickException(f"no common level was reached: {poise} {trl}")
    table = Table(title=f"{preset}: to a held-out reward")
    for column in ("level", "POISE tokens", "TRL tokens", "ratio", "POISE s", "TRL s", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for level in levels:
        row = {
            "level": level,
            "poise_tokens": at(poise.by_tokens, level),
            "trl_tokens": at(trl.by_tokens, level),
            "poise_s": at(poise.by_seconds, level),
            "trl_s": at(trl.by_seconds, level),
        }
        row |= {
            "tokens_ratio": row["poise_tokens"] / row["trl_tokens"],
            "wall_clock_ratio": row["poise_s"] / row["trl_s"],
        }
        rows.append(row)
        table.add_row(
            f"{level:.3f}",
            *(f"{row[key]:.0f}" for key in ("poise_tokens", "trl_tokens")),
            f"{row['tokens_ratio']:.2f}",
            *(f"{row[key]:.0f}" for key in ("poise_s", "trl_s")),
            f"{row['wall_clock_ratio']:.2f}",
        )
    Console().print(table)
    figures = {key: rows[-1][key] for key in ("wall_clock_ratio", "tokens_ratio")}
    about = {"preset": preset, "tokens": tokens, "evaluations": evaluations, "seed": seed, "group_trl": GROUP}
    curves = {
        name: {
            "tokens": one.by_tokens.x.tolist(),
            "seconds": one.by_seconds.x.tolist(),
            "reward": one.by_tokens.y.tolist(),
        }
        for name, one in (("poise", poise), ("trl", trl))
    }
    path = HERE / "results" / "versus_trl.json"
    path.write_text(
        json.dumps({"figures": figures, "settings": about, "levels": rows, "curves": curves}, indent=1) + "\n"
    )
    click.echo(f"at the highest level that both reach: {figures}; wrote {path}")


if __name__ == "__main__":
    main()
