"""How many tokens does each algorithm need to reach a held-out reward, on a real language model with vLLM?

Runs `poise compare -c compare_smollm2.yaml`: seven algorithms on SmolLM2-135M-Instruct, two seeds, one budget of
sampled tokens; an hour or more on two cores, resumable. Prints a table of the levels, and writes
results/compare_smollm2.json and the curves in figures/:

- `tokens_vs_grpo`: POISE's tokens / GRPO-8's, at the highest level that the mean curves of both reach.

The whole report is in compare/compare_smollm2.
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
