"""How many tokens and seconds does each algorithm need to reach a held-out reward, on a real language model with vLLM?

Runs `poise compare -c compare_smollm2.yaml`: ten algorithms on SmolLM2-135M-Instruct, three seeds, one budget of
sampled tokens; resumable, one run at a time. Prints a table of the levels, and writes results/compare_smollm2.json and
the curves in figures/. The figures are those of `compare_tiny.py`, also in seconds of training.

The whole report is in compare/compare_smollm2.
"""

from __future__ import annotations

import click
from comparing import common_figures, compare, keep, show

OURS = "poise-1"


@click.command()
def main() -> None:
    tree = compare("compare_smollm2")
    show(tree, {})
    figures = common_figures(tree, OURS, tree["levels"], ("tokens", "seconds"))
    figures["variants"] = {"poise-2": common_figures(tree, "poise-2", tree["levels"], ("tokens", "seconds"))}
    keep("compare_smollm2", tree, figures)


if __name__ == "__main__":
    main()
