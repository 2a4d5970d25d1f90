"""How many tokens does each algorithm need to reach a held-out reward?

Runs `poise compare -c compare_tiny.yaml` (twelve algorithms, eight seeds or five, one budget of sampled tokens;
resumable), two runs at a time. Prints a table of the levels, and writes results/compare_tiny.json and the curves in
figures/. The figures are those of POISE with one rollout; those of other variants are under `variants`:

- `tokens_vs_grpo`: tokens / GRPO-8's, at the highest level that the mean curves of both reach;
- `tokens_vs_best_rival_to_0.8`, `_0.9`: tokens / those of the best of PPO, SPO, RLOO, GRPO, DAPO, `none` and
  `batch_mean`; `tokens_vs_ppo_and_spo_to_…` of the best of these two;
- `tokens_vs_RIVAL_to_LEVEL_interval`: 95 % intervals, by a bootstrap over seeds;
- `final_reward`, `pass_at_8_of_…`, `token_entropy_of_…` at the end of the budget.

The noise / signal in the table is that of `gradient_variance.py`, if its results exist. The whole report is in
compare/compare_tiny.
"""

from __future__ import annotations

import json

import click
from comparing import HERE, common_figures, compare, keep, show

OURS = "poise-1"
VARIANTS = ("poise-1-mean", "poise-1-prefix", "poise-2")
LEVELS = (0.8, 0.9)


def noise_vs_grpo() -> dict[str, float]:
    """Return noise / signal of the gradient relative to GRPO after some training; empty if it was not measured."""
    path = HERE / "results" / "gradient_variance_tiny.json"
    stages = json.loads(path.read_text())["stages"] if path.exists() else {}
    names = {
        "poise-1": "poise-1 auto",
        "poise-1-mean": "poise-1 score_mean",
        "poise-1-prefix": "poise-1 score_prefix",
        "poise-2": "poise-2 probe",
    }
    results = stages.get("trained", {}).get("results", {})
    of_table = {name: names.get(name, name) for name in (*names, *results)}
    return {name: results[own]["vs_grpo-8"][0] for name, own in of_table.items() if own in results}


@click.command()
@click.option("--parts", default=2, show_default=True, help="Runs that train at a time.")
def main(parts: int) -> None:
    tree = compare("compare_tiny", parts)
    show(tree, noise_vs_grpo())
    figures = common_figures(tree, OURS, LEVELS)
    figures["variants"] = {name: common_figures(tree, name, LEVELS) for name in VARIANTS if name in tree["runs"]}
    keep("compare_tiny", tree, figures)


if __name__ == "__main__":
    main()
