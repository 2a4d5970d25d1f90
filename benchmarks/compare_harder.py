"""Compare algorithms with long responses, and from a policy that starts confidently wrong: reward and diversity.

Three cases, each a comparison of the same algorithms:

- `lists`: a small model copies, shifts and swaps lists of 16 digits, in 17 tokens; compare_lists.yaml;
- `wrong`: a small model gives the answer of another skill nine times out of ten; compare_wrong.yaml;
- `words`: SmolLM2 with vLLM repeats, reverses and sorts lists of numbers, in up to 28 tokens; compare_words.yaml.

Makes models and data in compare/harder if they are missing (`harder_models.py`), runs `poise compare`, resumable, and
writes results/compare_CASE.json and the curves in figures/. Look at pass@8 and token entropy besides the reward.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import harder_models
from comparing import HERE, common_figures, compare, keep, show

CASES = ("lists", "wrong", "words")
OURS = "poise-1"


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(CASES))
@click.option("--parts", type=int, help="Runs that train at a time; by default two, with vLLM one.")
@click.option("--prepare-only", is_flag=True, help="Only make models and data.")
def main(cases: tuple[str, ...], parts: int | None, prepare_only: bool) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    for case in cases or CASES:
        prepare(case, Path("compare/harder"))
        if prepare_only:
            continue
        tree = compare(f"compare_{case}", parts or (1 if case == "words" else 2))
        show(tree, {})
        figures = common_figures(tree, OURS, tree["levels"])
        figures["variants"] = {name: common_figures(tree, name, tree["levels"]) for name in variants(tree)}
        keep(f"compare_{case}", tree, figures)


def variants(tree: dict[str, dict[str, object]]) -> list[str]:
    return [name for name in tree["runs"] if name.startswith("poise-") and name != OURS]


def prepare(case: str, folder: Path) -> None:
    """Make the case's model and data if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    match case:
        case "lists" if not (folder / "lists" / "config.json").exists():
            harder_models.make_lists_model(folder / "lists", folder / "lists.jsonl")
        case "wrong" if not (folder / "wrong" / "config.json").exists():
            harder_models.make_wrong_model(folder / "wrong")
        case "words" if not (folder / "words.jsonl").exists():
            harder_models.make_words(folder / "words.jsonl")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
