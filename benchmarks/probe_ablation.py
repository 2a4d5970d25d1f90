"""Which inputs help the probe, and how good are other estimators, on real rollouts?

`collect` samples SmolLM2-135M-Instruct once (see `probe_ablation_data`). `evaluate` compares estimators on these
rollouts, prints tables, and writes results/probe_ablation.json and figures/probe_ablation.svg. The first `evaluate`
trains the critic, about ten minutes, and saves its values beside the rollouts.

**New prompts.** Estimators are fitted on the training prompts, 384 a domain with two rollouts each, and judged on 48
held-out prompts a domain with sixteen. Each rollout's value is compared with the eight rollouts of the other half of
its prompt: with their mean (Avg@8), and with each of their rewards, which gives the advantage of a group of two.
Intervals are 95 % bootstraps over held-out prompts within domains; all domains have equal weight.

**Prompts that come again.** Half of a held-out prompt's rollouts are its past, two a pass; the other half are new and
compared with each other. The tracker has seen the past, and so has a probe whose window contains it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import torch
from probe_ablation_data import collect, default_folder, load
from probe_ablation_estimators import (
    CONSTANT,
    CRITIC,
    FRUGAL,
    PASSES,
    REFERENCE,
    RLOO,
    SEEN,
    TRACKER,
    WITH_REWARD,
    on_new_prompts,
    on_prompts_again,
)
from probe_ablation_metrics import FIGURES, other_half, row_sums, within_variance
from probe_ablation_report import Report, as_json, domains_table, plot, report, report_table
from probe_ablation_windows import WINDOWS, on_windows, windows_table
from rich.console import Console
from tqdm import tqdm

HERE = Path(__file__).parent


@click.group()
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_folder,
    show_default="~/.cache/poise/benchmarks/probe_ablation",
    help="Folder of the rollouts.",
)
@click.pass_context
def main(context: click.Context, folder: Path) -> None:
    """Compare inputs of the probe, and other estimators, on real rollouts."""
    context.obj = folder


@main.command("collect")
@click.pass_obj
def collect_command(folder: Path) -> None:
    """Sample the missing rollouts: about 15 minutes on two cores. An interrupted call can be repeated."""
    collect(folder)


@main.command()
@click.pass_obj
def evaluate(folder: Path) -> None:
    """Fit and compare the estimators; print and write the results."""
    console = Console(width=180)
    domains = load(folder)
    console.print(domains_table(domains))
    rewards = [domain.held_out.rewards for domain in domains]
    best = float(np.mean([within_variance(r) for r in rewards]))
    names = ", ".join(domain.name for domain in domains)
    caption = f"means over {names}; {best:.4f} of the mean A² is the rollouts' own chance"

    values, training_s = on_new_prompts(domains, folder)
    sums = {
        name: [row_sums(v, r, other_half(r.shape[1])) for v, r in zip(by_domain, rewards, strict=True)]
        for name, by_domain in values.items()
    }
    new = report(sums, REFERENCE)
    against_critic = report(sums, CRITIC)[FRUGAL[WITH_REWARD]]["squared_advantage"].gap
    console.print("A² of the default probe minus the critic's, with its interval, paired by prompt:", against_critic)
    console.print(report_table("new prompts", new, caption))
    again = {passes: report(sums, SEEN) for passes, sums in on_prompts_again(domains).items()}
    for passes, found in again.items():
        console.print(report_table(f"prompts that came {passes} times before", found, caption))
    windows = {num_rows: on_windows(domains, num_rows) for num_rows in tqdm(WINDOWS, "windows", leave=False)}
    console.print(windows_table(windows))
    console.print("training, s: " + ", ".join(f"{name} {spent:.2f}" for name, spent in training_s.items()))

    lines = {name: [again[passes][name]["squared_advantage"] for passes in PASSES] for name in again[0]}
    plot(new, lines, PASSES, best, HERE / "figures/probe_ablation.svg")
    result = {
        "figures": key_figures(new, again, best, training_s),
        "machine": {
            "processor": processor(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "domains": {
            domain.name: {
                "mean_reward": float(domain.held_out.rewards.mean()),
                "best_squared_advantage": within_variance(domain.held_out.rewards),
            }
            for domain in domains
        },
        "training_s": training_s,
        "presets_minus_critic": against_critic,
        "new_prompts": as_json(new),
        "prompts_again": {passes: as_json(found) for passes, found in again.items()},
        "windows": {num_rows: as_json(found) for num_rows, found in windows.items()},
    }
    path = HERE / "results/probe_ablation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(str(path))


def processor() -> str:
    lines = (line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((line[1].strip() for line in lines if line[0].strip() == "model name"), platform.processor())


def key_figures(
    new: Report, again: Mapping[int, Report], best: float, training_s: Mapping[str, float]
) -> dict[str, float]:
    def squared(name: str) -> float:
        return new[name]["squared_advantage"].value

    passes = PASSES[-1]
    return {
        **{key: new[REFERENCE][key].value for key in FIGURES},
        "pearson_entropy_only": new["probe: entropy"]["pearson"].value,
        "pearson_response_only": new["probe: response"]["pearson"].value,
        "pearson_prompt_only": new["probe: prompt"]["pearson"].value,
        "pearson_with_sibling_reward": new[WITH_REWARD]["pearson"].value,
        "pearson_critic": new[CRITIC]["pearson"].value,
        "squared_advantage_of_rloo": squared(RLOO),
        "squared_advantage_of_batch_mean": squared("batch mean"),
        "squared_advantage_of_constant": squared(CONSTANT),
        "squared_advantage_of_critic": squared(CRITIC),
        "squared_advantage_with_sibling_reward": squared(WITH_REWARD),
        "squared_advantage_of_presets": squared(FRUGAL[WITH_REWARD]),
        "pearson_of_presets": new[FRUGAL[WITH_REWARD]]["pearson"].value,
        "squared_advantage_at_best": best,
        f"squared_advantage_after_{passes}_passes": again[passes][SEEN]["squared_advantage"].value,
        f"squared_advantage_of_tracker_after_{passes}_passes": again[passes][TRACKER]["squared_advantage"].value,
        "critic_over_probe_training": training_s["critic"] / training_s["probe"],
    }


if __name__ == "__main__":
    main()
