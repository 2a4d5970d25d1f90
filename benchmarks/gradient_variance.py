"""How noisy is each algorithm's gradient, at the same policy and for the same number of sampled tokens?

Stops a run of the `tiny` preset in the middle and keeps its services up. Each algorithm samples batches with the
run's own code, and the learner's code computes their gradients before clipping, at a learning rate that moves
nothing. Over K independent batches with gradients g_k

    noise   tr Cov(g) = (Σ‖g_k‖² − ‖Σ g_k‖²/K) / (K − 1)
    signal  ‖E g‖²    = (‖Σ g_k‖² − Σ‖g_k‖²) / (K(K − 1))

are unbiased. A batch of twice the tokens has half the noise, so noise is multiplied by the tokens of a batch,
including those of dropped groups. Dividing by a standard deviation, and a baseline that contains the rollout's own
reward, scale noise and signal alike, so the result is noise / signal. `halves` is tr Cov(g) as
`learner.measure_gradient_variance` estimates it, from the two halves of each batch.

Each baseline knows what it would know in the run. The probe is the run's own, fitted to older policies. SPO's
trackers and PPO's critic learn on the prompts that the run trained on, sampled again from the current policy. Prints
a table and writes results/gradient_variance.json. Intervals are 95 %, by the jackknife over batches.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from poise.learner.config import LearnerConfig
from poise.learner.training.trainer import Trainer
from poise.local.run_file import LocalRun, load_run, preset_path
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.storage.step_journal import JournalledStep
from poise.orchestrator.tasks.mixture import Mixture

HERE = Path(__file__).parent
REFERENCE = "grpo-8"
ROLLOUTS = 128
"""Rollouts of a batch."""
FIRST_STEP = 100_000
"""First step of the measured batches, so that their prompts differ from those of the run."""
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0, "gradient_clip": 1e30, "warmup_updates": 0}

ALGORITHMS: dict[str, tuple[str, int]] = {
    "poise-2": ("poise", 2),
    "rloo-2": ("rloo", 2),
    "rloo-8": ("rloo", 8),
    "grpo-8": ("grpo", 8),
    "dr_grpo-8": ("dr_grpo", 8),
    "dapo-8": ("dapo", 8),
    "opo-8": ("opo", 8),
    "reinforce_pp-2": ("reinforce_pp", 2),
    "spo-1": ("spo", 1),
    "ppo-1": ("ppo", 1),
}

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Result of one algorithm; intervals are half widths."""

    tokens: float
    """Mean tokens sampled for a batch."""
    noise: float
    """tr Cov(g) of a batch."""
    noise_interval: float
    signal: float
    signal_interval: float
    halves: float
    noise_tokens: float
    """noise x tokens."""
    ratio_tokens: float
    """noise / signal x tokens."""


class NoCallbacks:
    """Callbacks that do nothing."""

    def on_phase(self, step: int, name: str) -> None: ...

    def on_sampled(self, step: int, done: int, total: int) -> None: ...


def noise_and_signal(products: Doubles) -> tuple[float, float]:
    """Return noise and signal from the gradients' inner products [K, K]."""
    k = len(products)
    squares, square_of_sum = float(np.trace(products)), float(products.sum())
    return (squares - square_of_sum / k) / (k - 1), (square_of_sum - squares) / (k * (k - 1))


def jackknifed(products: Doubles, statistic: Callable[[Doubles], float]) -> float:
    """Return the half width of a statistic's 95 % interval."""
    k = len(products)
    left_out = [statistic(np.delete(np.delete(products, i, 0), i, 1)) for i in range(k)]
    return 1.96 * math.sqrt((k - 1) / k * float(np.square(np.array(left_out) - np.mean(left_out)).sum()))


async def measure(
    name: str,
    run: LocalRun,
    services: ServiceClients,
    verifiers: VerifierPool,
    model: str,
    num_batches: int,
    policy_version: int,
) -> Measured:
    """Sample batches and return noise and signal of their gradients."""
    kind, num_rollouts = ALGORITHMS[name]
    config = run.train.model_validate(
        run.train.model_dump()
        | {
            "run_id": f"variance-{name}",
            "algorithm": {"kind": kind, **({"bootstrap": "batch_mean"} if kind == "poise" else {})},
            "rollouts_per_prompt": num_rollouts,
            "prompts_per_step": ROLLOUTS // num_rollouts,
            "samples_per_step": 0,
        }
    )
    trainer = still_trainer(config, run.learner, model)
    callbacks: Any = NoCallbacks()
    folder = RunFolder(run.dir / config.run_id)
    folder.open(config.run_id, {})
    mixture = Mixture(config.tasks, config.seed)
    loop = TrainingLoop(config, folder, services, verifiers, mixture, callbacks, asyncio.Event())

    async def sample(step: int) -> JournalledStep:
        journalled = await loop.sample_step(step, policy_version)
        folder.journal.drop(step)
        return journalled

    if kind in ("spo", "ppo"):
        for step in range(run.train.num_steps):
            taught = await sample(step)
            if kind == "ppo":
                await asyncio.to_thread(trainer.train, taught.batch.rollouts, taught.batch.temperature)
    gradients, tokens, halves = [], [], []
    for step in range(FIRST_STEP, FIRST_STEP + num_batches):
        journalled = await sample(step)
        metrics = await asyncio.to_thread(trainer.train, journalled.batch.rollouts, journalled.batch.temperature)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters() if p.grad is not None]))
        tokens.append(journalled.metrics["response_tokens"]["total"])
        halves.append(metrics.gradient_variance)
    stacked = torch.stack(gradients).double()
    products: Doubles = (stacked @ stacked.T).numpy()
    noise, signal = noise_and_signal(products)
    mean_tokens = float(np.mean(tokens))
    return Measured(
        tokens=mean_tokens,
        noise=noise,
        noise_interval=jackknifed(products, lambda p: noise_and_signal(p)[0]),
        signal=signal,
        signal_interval=jackknifed(products, lambda p: noise_and_signal(p)[1]),
        halves=float(np.mean(halves)),
        noise_tokens=noise * mean_tokens,
        ratio_tokens=noise / signal * mean_tokens,
    )


def still_trainer(config: OrchestratorConfig, learner: LearnerConfig, model: str) -> Trainer:
    """Return a trainer with the algorithm's loss, whose policy does not move."""
    settings = config.algorithm.learner_settings(config.sampling.max_tokens)
    if "critic" in settings:
        settings["critic"] = {"learning_rate": learner.optimizer.learning_rate}
    values = learner.model_dump() | {"model": model, "mini_batch_prompts": ROLLOUTS, "measure_gradient_variance": True}
    values |= {
        "optimizer": learner.optimizer.model_dump() | STILL,
        "loss": learner.loss.model_dump() | settings.get("loss", {}),
    }
    trainer = Trainer(LearnerConfig(**(values | {"critic": settings.get("critic")})))
    trainer.load()
    return trainer


@asynccontextmanager
async def services_of(run: LocalRun, options: list[str]) -> AsyncIterator[None]:
    """Run the services of a stopped run."""
    command = [sys.executable, "-c", "from poise.cli import main; main()"]
    up = subprocess.Popen([*command, "up", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        check = await asyncio.create_subprocess_exec(*command, "check", *options, stdout=subprocess.DEVNULL)
        if await check.wait():
            raise click.ClickException(f"the services did not come up; look at {run.dir / 'logs'}")
        yield
    finally:
        up.terminate()
        up.wait()


async def measure_all(run: LocalRun, options: list[str], names: list[str], num_batches: int) -> dict[str, Measured]:
    """Return the result of each algorithm at the run's policy."""
    results = {}
    async with (
        services_of(run, options),
        ServiceClients(run.train.endpoints, asyncio.Event()) as services,
        VerifierPool(run.train.verifier) as verifiers,
    ):
        status = await services.learner_status()
        model = (await services.export_model("frozen")).path
        for name in names:
            results[name] = await measure(name, run, services, verifiers, model, num_batches, status.policy_version)
            click.echo(f"{name}: {results[name]}", err=True)
    return results


def show(results: dict[str, Measured], num_steps: int) -> None:
    table = Table(title=f"gradients of {ROLLOUTS} rollouts at the policy after {num_steps} steps")
    for column in ("", "tokens", "signal", "noise", "halves", "noise x tokens", "noise/signal x tokens"):
        table.add_column(column, justify="right" if column else "left")
    reference = results[REFERENCE]
    for name, one in results.items():
        table.add_row(
            name,
            f"{one.tokens:.0f}",
            f"{one.signal:.3g} ± {one.signal_interval:.1g}",
            f"{one.noise:.3g} ± {one.noise_interval:.1g}",
            f"{one.halves:.3g}",
            f"{one.noise_tokens / reference.noise_tokens:.2f}",
            f"{one.ratio_tokens / reference.ratio_tokens:.2f}",
        )
    Console().print(table, f"ratios to {REFERENCE}")


@click.command()
@click.option("--steps", default=12, show_default=True, help="Steps of the run before its policy is frozen.")
@click.option("--batches", default=64, show_default=True, help="Batches for each algorithm.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(ALGORITHMS)), help="Measure these algorithms and the reference."
)
def main(steps: int, batches: int, only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    names = [name for name in ALGORITHMS if not only or name in {*only, REFERENCE}]
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.dir={folder}/run", "run.name=frozen", f"train.num_steps={steps}", "learner.threads=1"]
        settings.append("train.evaluation.num_prompts=0")
        run = load_run(preset_path("tiny"), settings)
        options = ["--preset", "tiny", *(part for value in settings for part in ("--set", value))]
        subprocess.run([sys.executable, "-c", "from poise.cli import main; main()", "run", *options], check=True)
        results = asyncio.run(measure_all(run, options, names, batches))
    show(results, steps)
    poise, reference = results["poise-2"], results[REFERENCE]
    figures = {
        "gradient_variance_vs_grpo": poise.ratio_tokens / reference.ratio_tokens,
        "raw_gradient_variance_vs_grpo": poise.noise_tokens / reference.noise_tokens,
    }
    path = HERE / "results" / "gradient_variance.json"
    about = {"preset": "tiny", "steps": steps, "batches": batches, "rollouts": ROLLOUTS, "reference": REFERENCE}
    values = {"figures": figures, "settings": about, "results": {name: asdict(one) for name, one in results.items()}}
    path.write_text(json.dumps(values, indent=1) + "\n")
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
