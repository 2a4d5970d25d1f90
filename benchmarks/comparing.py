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

from rich.console import Console
from rich.table import Table

from poise.report.comparison.figures import curve_figure

HERE = Path(__file__).parent
OURS, REFERENCE = "poise-2", "grpo-8"
Tree = dict[str, Any]
"""Content of comparison.json."""


def compare(name: str) -> Tree:
    """Run or resume `poise compare` on NAME.yaml beside this file, and return its comparison.json."""
    command = [sys.executable, "-c", "from poise.cli import main; main()", "compare"]
    if status := subprocess.run([*command, "-c", str(HERE / f"{name}.yaml")]).returncode:
        raise SystemExit(status)  # the command has printed the reason
    tree: Tree = json.loads((Path("compare") / name / "comparison.json").read_text())
    return tree


def tokens_ratio(tree: Tree, ours: Sequence[str] = (OURS,), reference: Sequence[str] = (REFERENCE,)) -> float | None:
    """Return tokens of `ours` / tokens of `reference` at the highest level that the mean curves of both reach.

    At each level the best of the runs counts. None if there is no common level.
    """
    both = zip(_fewest_tokens(tree, ours), _fewest_tokens(tree, reference), strict=True)
    reached = [one / other for one, other in both if one < math.inf and other < math.inf]
    return reached[-1] if reached else None


def _fewest_tokens(tree: Tree, names: Sequence[str]) -> list[float]:
    """Return the tokens of the best run to each level; infinity where none reached it."""
    runs = [tree["runs"][name]["to_reach"]["tokens"] for name in names]
    reached = [
        [math.inf if reach["on_mean_curve"] is None else reach["on_mean_curve"] for reach in run] for run in runs
    ]
    return [min(of_level) for of_level in zip(*reached, strict=True)]


def _ratios(tree: Tree) -> dict[str, dict[float, float | None]]:
    """Return the tokens of each run to each level, relative to the reference."""
    return {
        name: {reach["level"]: reach["ratio"] for reach in run["to_reach"]["tokens"]}
        for name, run in tree["runs"].items()
    }


def show(tree: Tree, noise: Mapping[str, float]) -> None:
    """Print one line a run, with the `noise` of its gradient relative to the reference where measured."""
    table = Table(title=f"tokens to a held-out reward, relative to {tree['reference']}")
    columns = ["", *(f"{level:g}" for level in tree["levels"]), "final", *(["noise/signal"] if noise else [])]
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, ratios in _ratios(tree).items():
        final = tree["runs"][name]["final"]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios.values()]
        cells.append(f"{final['mean']:.3f} ({final['low']:.3f} to {final['high']:.3f})")
        if noise:
            cells.append(f"{noise[name]:.2f}" if name in noise else "-")
        table.add_row(name, *cells)
    Console().print(table)


def keep(name: str, tree: Tree, figures: Mapping[str, float | None]) -> None:
    """Write results/NAME.json, and the curves to figures/."""
    for run in tree["runs"].values():
        for seed in run["seeds"].values():
            del seed["folder"]  # a path on this machine
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps({"figures": figures, "comparison": tree}, separators=(",", ":")) + "\n")
    for axis in ("tokens", "seconds"):
        if (drawing := curve_figure(tree, axis)) is not None:
            (HERE / "figures" / f"{name}_{axis}.svg").write_text(drawing)
    print(f"{dict(figures)}; wrote {path}")
