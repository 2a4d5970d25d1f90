"""How many tokens does POISE take to a held-out reward, beside its rivals, and how noisy are their gradients?

Runs `poise compare -c compare_tiny.yaml` (seven ways to train, five seeds, one budget of sampled tokens; resumable,
half an hour on two cores) and then `gradient_variance.py`, and puts both together in results/compare_tiny.json:

- `tokens_vs_grpo`: POISE's tokens by GRPO-8's, to the highest of the levels that the mean curves of both reach;
- `gradient_variance_vs_grpo`: noise by signal of the gradient at equal tokens, POISE's by GRPO-8's, at one policy.

Prints a table of the levels, draws the curves into benchmarks/figures. The whole report is in compare/compare_tiny.
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
