"""How many tokens does POISE take to a held-out reward, beside its rivals, and how noisy are their gradients?

Runs `poise compare -c compare_tiny.yaml` (seven ways to train, five seeds, one budget of sampled tokens; resumable,
half an hour on two cores) and then `gradient_variance.py`, and puts both together in results/compare_tiny.json:

- `tokens_vs_grpo`: POISE's tokens by GRPO-8's, to the highest of the levels that the mean curves of both reach;
- `gradient_variance_vs_grpo`: noise by signal of the gradient at equal tokens, POISE's by GRPO-8's, at one policy.

Prints a table of the levels. The whole report is in compare/compare_tiny.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OURS, REFERENCE = "poise-2", "grpo-8"


def ratios(comparison: dict[str, Any]) -> dict[str, dict[float, float | None]]:
    """Return the tokens of each run to each level, by the reference's."""
    return {
        name: {reach["level"]: reach["ratio"] for reach in run["to_reach"]["tokens"]}
        for name, run in comparison["runs"].items()
    }


def show(comparison: dict[str, Any], noise: dict[str, Any]) -> None:
    table = Table(title=f"tokens to a held-out reward, by those of {REFERENCE}; noise of the gradient likewise")
    found = ratios(comparison)
    for column in ("", *(f"{level:g}" for level in comparison["levels"]), "final", "noise/signal"):
        table.add_column(column, justify="right" if column else "left")
    for name, run in comparison["runs"].items():
        final, own = run["final"], noise["results"].get(name)
        reference = noise["results"][REFERENCE]["ratio_tokens"]
        table.add_row(
            name,
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in found[name].values()),
            f"{final['mean']:.3f} ({final['low']:.3f} to {final['high']:.3f})",
            "-" if own is None else f"{own['ratio_tokens'] / reference:.2f}",
        )
    Console().print(table)


@click.command()
def main() -> None:
    command = [sys.executable, "-c", "from poise.cli import main; main()", "compare"]
    subprocess.run([*command, "-c", str(HERE / "compare_tiny.yaml")], check=True)
    comparison = json.loads(Path("compare/compare_tiny/comparison.json").read_text())
    subprocess.run([sys.executable, str(HERE / "gradient_variance.py")], check=True)
    noise = json.loads((HERE / "results" / "gradient_variance.json").read_text())
    reached = [ratio for ratio in ratios(comparison)[OURS].values() if ratio is not None]
    figures = {
        "tokens_vs_grpo": reached[-1] if reached else None,
        "gradient_variance_vs_grpo": noise["figures"]["gradient_variance_vs_grpo"],
    }
    show(comparison, noise)
    for run in comparison["runs"].values():
        for seed in run["seeds"].values():
            del seed["folder"]  # of this machine
    path = HERE / "results" / "compare_tiny.json"
    path.write_text(json.dumps({"figures": figures, "comparison": comparison}, indent=1) + "\n")
    click.echo(f"{figures}; wrote {path}")


if __name__ == "__main__":
    main()
