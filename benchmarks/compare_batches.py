"""How much does POISE save beside GRPO when updates are small, and when they are large?

Runs `poise compare -c compare_batches.yaml`: both on the tiny preset with 32, 64 and 128 rollouts an update, three
seeds, one budget of sampled tokens; ten minutes on two cores, resumable. Writes results/compare_batches.json, with

- `tokens_vs_grpo_32`, `_64`, `_128`: POISE's tokens by those of GRPO-8 with updates of that size, to the highest of the
  levels that both mean curves reach;
- `grpo_8_of_64_vs_32`, `grpo_8_of_128_vs_32`: GRPO's own tokens by what it takes with the smallest updates, likewise.

Prints a table of the levels, draws the curves into docs/figures. The whole report is in compare/compare_batches.
"""

from __future__ import annotations

import click
from comparing import compare, keep, show, tokens_ratio

SIZES = (32, 64, 128)


@click.command()
def main() -> None:
    tree = compare("compare_batches")
    show(tree, {})
    figures = {f"tokens_vs_grpo_{n}": tokens_ratio(tree, f"poise-2-of-{n}", f"grpo-8-of-{n}") for n in SIZES}
    figures |= {f"grpo_8_of_{n}_vs_32": tokens_ratio(tree, f"grpo-8-of-{n}", "grpo-8-of-32") for n in SIZES[1:]}
    keep("compare_batches", tree, figures)


if __name__ == "__main__":
    main()
