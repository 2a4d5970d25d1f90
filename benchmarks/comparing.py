"""Run a comparison of algorithms, print its levels, and write its results.

Presets and budgets are in the YAML file of each comparison.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from poise.report.comparison.figures import curve_figure

HERE = Path(__file__).parent
OURS, REFERENCE = "poise-2", "grpo-8"
RIVALS = ("ppo-1", "spo-1", "rloo-2", "rloo-8", "grpo-8", "dapo-8", "none-1", "batch_mean-1")
NUM_RESAMPLES = 2000
Tree = dict[str, Any]
"""Content of comparison.json."""


def compare(name: str, num_parts: int = 1) -> Tree:
    """Run or resume `poise compare` on NAME.yaml beside this file, and return its comparison.json.

    With several parts, that many runs train at a time.
    """
    command = [sys.executable, "-c", "from poise.cli import main; main()", "compare", "-c", str(HERE / f"{name}.yaml")]
    parts = [
        subprocess.Popen([*command, "--part", f"{index}/{num_parts}"], stdout=None if index == 1 else sys.stderr)
        for index in range(1, num_parts + 1)
    ]
    try:
        statuses = [part.wait() for part in parts]
    except KeyboardInterrupt:  # the parts get it too, and stop after their current step
        statuses = [part.wait() for part in parts]
    if any(statuses):
        raise SystemExit(max(statuses))  # the command has printed the reason
    if num_parts > 1:
        subprocess.run([*command, "--report-only"], check=True)
    tree: Tree = json.loads((Path("compare") / name / "comparison.json").read_text())
    return tree


def tokens_ratio(tree: Tree, ours: Sequence[str] = (OURS,), reference: Sequence[str] = (REFERENCE,)) -> float | None:
    """Return tokens of `ours` / tokens of `reference` at the highest level that the mean curves of both reach.

    At each level the best of the runs counts. None if there is no common level.
    """
    both = zip(_fewest(tree, ours), _fewest(tree, reference), strict=True)
    reached = [one / other for one, other in both if one < math.inf and other < math.inf]
    return reached[-1] if reached else None


def ratio_at(
    tree: Tree, level: float, ours: Sequence[str], reference: Sequence[str], axis: str = "tokens"
) -> float | None:
    """Return tokens, or seconds, of the best of `ours` / those of the best `reference` to one of the tree's levels.

    None if `ours` does not reach it; 0 if only `ours` does.
    """
    index = tree["levels"].index(level)
    one, other = (_fewest(tree, [n for n in names if n in tree["runs"]], axis)[index] for names in (ours, reference))
    return None if one == math.inf else one / other


def _fewest(tree: Tree, names: Sequence[str], axis: str = "tokens") -> list[float]:
    """Return the tokens or seconds of the best run to each level; infinity where none reached it."""
    runs = [tree["runs"][name]["to_reach"][axis] for name in names]
    reached = [
        [math.inf if reach["on_mean_curve"] is None else reach["on_mean_curve"] for reach in run] for run in runs
    ]
    return [min(of_level) for of_level in zip(*reached, strict=True)]


def ratio_interval(tree: Tree, level: float, ours: str, reference: str, axis: str = "tokens") -> list[float] | None:
    """Return the 95 % interval of the ratio of two runs to a level, by a bootstrap over seeds; None if not reached."""
    random = np.random.default_rng(0)
    one, other = (_crossings(tree["runs"][name], level, axis, random) for name in (ours, reference))
    ratios = one / other
    if np.isnan(ratios).mean() > 0.025:
        return None
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return [float(low), float(high)]


def _crossings(run: Tree, level: float, axis: str, random: np.random.Generator) -> NDArray[np.float64]:
    """Return where the mean curve of resampled seeds reaches a level; NaN where it does not."""
    key = {"tokens": "tokens", "seconds": "wall_s"}[axis]
    curves = [[(each[key], each["mean"]) for each in seed["evaluations"]] for seed in run["seeds"].values()]
    grid = np.linspace(0, min(curve[-1][0] for curve in curves), 1001)
    rewards = np.array([np.interp(grid, *np.array(curve).T) for curve in curves])
    chosen = random.integers(len(curves), size=(NUM_RESAMPLES, len(curves)))
    means = rewards[chosen].mean(axis=1)
    reached = means >= level
    return np.where(reached.any(axis=1), grid[reached.argmax(axis=1)], np.nan)


def common_figures(tree: Tree, ours: str, levels: Sequence[float], axes: Sequence[str] = ("tokens",)) -> Tree:
    """Return the figures of one of our runs: relative to GRPO, to the best rival, and at the end of the budget."""
    figures: Tree = {"tokens_vs_grpo": tokens_ratio(tree, [ours])}
    rivals = [name for name in RIVALS if name in tree["runs"]]
    for axis in axes:
        for level in levels:
            for label, others in (("best_rival", rivals), ("ppo_and_spo", ["ppo-1", "spo-1"]), ("grpo", [REFERENCE])):
                figures[f"{axis}_vs_{label}_to_{level:g}"] = ratio_at(tree, level, [ours], others, axis)
            for rival in rivals:
                figures[f"{axis}_vs_{rival}_to_{level:g}_interval"] = ratio_interval(tree, level, ours, rival, axis)
    figures["final_reward"] = tree["runs"][ours]["final"]["mean"]
    figures["final_reward_of_best_rival"] = max(tree["runs"][name]["final"]["mean"] for name in rivals)
    for name in (ours, "ppo-1", "none-1", "batch_mean-1"):
        if name in tree["runs"]:
            run = tree["runs"][name]
            figures[f"pass_at_8_of_{name}"] = (run["final_pass_at_k"].get("pass@8") or {}).get("mean")
            figures[f"token_entropy_of_{name}"] = (run["final_token_entropy"] or {}).get("mean")
    return figures


def _ratios(tree: Tree) -> dict[str, dict[float, float | None]]:
    """Return the tokens of each run to each level, relative to the reference."""
    return {
        name: {reach["level"]: reach["ratio"] for reach in run["to_reach"]["tokens"]}
        for name, run in tree["runs"].items()
    }


def show(tree: Tree, noise: Mapping[str, float]) -> None:
    """Print one line a run, with the `noise` of its gradient relative to the reference where measured."""
    table = Table(title=f"tokens to a held-out reward, relative to {tree['reference']}")
    columns = ["", *(f"{level:g}" for level in tree["levels"]), "final", "pass@8", "entropy"]
    for column in [*columns, *(["noise/signal"] if noise else [])]:
        table.add_column(column, justify="right" if column else "left")
    for name, ratios in _ratios(tree).items():
        run = tree["runs"][name]
        final, pass_at_8 = run["final"], run["final_pass_at_k"].get("pass@8")
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios.values()]
        cells.append(f"{final['mean']:.3f} ({final['low']:.3f} to {final['high']:.3f})")
        cells += ["-" if each is None else f"{each['mean']:.3f}" for each in (pass_at_8, run["final_token_entropy"])]
        if noise:
            cells.append(f"{noise[name]:.2f}" if name in noise else "-")
        table.add_row(name, *cells)
    Console().print(table)


def markdown(tree: Tree, axis: str = "tokens") -> str:
    """Return a table for README.md: amounts to each level relative to the reference, and the end of the budget."""
    levels = " | ".join(f"{axis} to {level:g}" for level in tree["levels"])
    lines = [
        f"| | {levels} | final reward | pass@8 | entropy | seeds |",
        "|---" * (len(tree["levels"]) + 5) + "|",
    ]
    for name, run in tree["runs"].items():
        cells = ["–" if (ratio := each["ratio"]) is None else f"{ratio:.2f}" for each in run["to_reach"][axis]]
        final = run["final"]
        cells.append(f"{final['mean']:.3f} ({final['low']:.3f} to {final['high']:.3f})")
        ends = (run["final_pass_at_k"].get("pass@8"), run["final_token_entropy"])
        cells += ["–" if each is None else f"{each['mean']:.3f}" for each in ends]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(run['seeds'])} |")
    return "\n".join(lines)


def keep(name: str, tree: Tree, figures: Mapping[str, Any]) -> None:
    """Write results/NAME.json, and the curves to figures/; print the table of README.md."""
    print(markdown(tree))
    for run in tree["runs"].values():
        for seed in run["seeds"].values():
            del seed["folder"]  # a path on this machine
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps({"figures": figures, "comparison": tree}, separators=(",", ":")) + "\n")
    for axis in ("tokens", "seconds"):
        if (drawing := curve_figure(tree, axis)) is not None:
            (HERE / "figures" / f"{name}_{axis}.svg").write_text(drawing)
    print(json.dumps(figures, indent=1), f"wrote {path}", sep="\n")
