"""How many tokens does each algorithm need to reach a held-out reward, and how noisy is its gradient?

Runs `poise compare -c compare_tiny.yaml` (seven algorithms, five seeds, one budget of sampled tokens; resumable, half
an hour on two cores), then `gradient_variance.py`. Prints a table of the levels, and writes results/compare_tiny.json
and the curves in figures/:

- `tokens_vs_grpo`: POISE's tokens / GRPO-8's, at the highest level that the mean curves of both reach;
- `gradient_variance_vs_grpo`: noise / signal of the gradient at equal tokens and one policy, relative to GRPO-8.

The whole report is in compare/compare_tiny.
"""

from __future__ import annotations

import json
import subprocess
import sys

import click
from comparing import HERE, REFERENCE, compare, keep, show, tokens_ratio


@click.command()
def main() -> None:
    tree = compare("compare_tiny")
    subprocess.run([sys.executable, str(HERE / "gradient_variance.py")], check=True)
    variance = json.loads((HERE / "results" / "gradient_variance.json").read_text())
    reference = variance["results"][REFERENCE]["ratio_tokens"]
    show(tree, {name: own["ratio_tokens"] / reference for name, own in variance["results"].items()})
    figures = {
        "tokens_vs_grpo": tokens_ratio(tree),
        "gradient_variance_vs_grpo": variance["figures"]["gradient_variance_vs_grpo"],
    }
    keep("compare_tiny", tree, figures)


if __name__ == "__main__":
    main()
