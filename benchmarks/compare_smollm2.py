"""How many tokens does POISE take to a held-out reward beside its rivals, on a real language model with real vLLM?

Runs `poise compare -c compare_smollm2.yaml`: seven ways to train SmolLM2-135M-Instruct, two seeds, one budget of
sampled tokens; an hour and more on two cores, resumable. Writes results/compare_smollm2.json:

- `tokens_vs_grpo`: POISE's tokens by GRPO-8's, to the highest of the levels that the mean curves of both reach.

Prints a table of the levels, draws the curves into benchmarks/figures. The whole report is in compare/compare_smollm2.
"""

from __future__ import annotations

import click
from comparing import compare, keep, show, tokens_ratio


@click.command()
def main() -> None:
    tree = compare("compare_smollm2")
    show(tree, {})
    keep("compare_smollm2", tree, {"tokens_vs_grpo": tokens_ratio(tree)})


if __name__ == "__main__":
    main()
