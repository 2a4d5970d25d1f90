"""How many tokens does POISE save relative to GRPO with small and with large updates?

Runs `poise compare -c compare_batches.yaml`: both on the tiny preset with 16, 32, 64 and 128 rollouts an update,
three seeds, one budget of sampled tokens; ten minutes on two cores, resumable. Prints a table of the levels, and
writes results/compare_batches.json and the curves in figures/:

- `tokens_vs_grpo_16`, `_32`, `_64`, `_128`: POISE's tokens / GRPO-8's with updates of that size, at the highest level
  that both mean curves reach;
- `tokens_vs_grpo_best`: the same, each with its best size of update;
- `grpo_8_of_16_vs_32`, …: GRPO's own tokens relative to updates of 32.

The whole report is in compare/compare_batches.
"""

from __future__ import annotations

import click
from comparing import compare, keep, show, tokens_ratio

SIZES = (16, 32, 64, 128)
POISE = [f"poise-2-of-{size}" for size in SIZES]
GRPO = [f"grpo-8-of-{size}" for size in SIZES]


@click.command()
def main() -> None:
    tree = compare("compare_batches")
    show(tree, {})
    figures = {f"tokens_vs_grpo_{n}": tokens_ratio(tree, [p], [g]) for n, p, g in zip(SIZES, POISE, GRPO, strict=True)}
    figures["tokens_vs_grpo_best"] = tokens_ratio(tree, POISE, GRPO)
    figures |= {
        f"grpo_8_of_{n}_vs_32": tokens_ratio(tree, [f"grpo-8-of-{n}"], ["grpo-8-of-32"]) for n in SIZES if n != 32
    }
    keep("compare_batches", tree, figures)


if __name__ == "__main__":
    main()
