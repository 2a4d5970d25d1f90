"""The tables of a comparison, for HTML, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poise.report.curves import PHASES
from poise.report.page import decimal, duration, thousands

Tree = Mapping[str, Any]

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its title and a note for readers."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(tree: Tree) -> str:
    """Return the budget, and the number of finished runs if some are unfinished, as text."""
    (kind, amount), *_ = tree["budget"].items()
    unit = {"tokens": "response tokens", "wall_s": "seconds of training", "updates": "updates"}[kind]
    states = [seed["state"] for run in tree["runs"].values() for seed in run["seeds"].values()]
    num_finished = states.count("finished")
    partial = "" if tree["is_complete"] else f" Preliminary: {num_finished} of {len(states)} runs are finished."
    return f"Budget of each run: {thousands(amount)} {unit}.{partial}"


def tables(tree: Tree) -> list[Table]:
    """Return all tables."""
    to_reach = [_to_reach(tree, "tokens", thousands), _to_reach(tree, "seconds", duration)]
    return [_final(tree), *to_reach, _gradients(tree), _time(tree), _runs(tree)]


def _final(tree: Tree) -> Table:
    rows = []
    for name, run in tree["runs"].items():
        final = run["final"]
        cells = [decimal(final["mean"]), _range(final), final["interval"]] if final else [UNKNOWN] * 3
        largest = list(run["final_pass_at_k"])[-1:]
        cells += [f"{decimal(run['final_pass_at_k'][name]['mean'])} ({name})" for name in largest] or [UNKNOWN]
        cells.append(_mean(run["final_token_entropy"], decimal))
        usage = [_mean(run["num_steps"], thousands), _mean(run["tokens"], thousands), _mean(run["wall_s"], duration)]
        rows.append([name, run["algorithm"], *cells, *usage])
    names = ["run", "algorithm", "held-out reward", "interval", "kind of interval", "pass@k", "token entropy"]
    head = [*names, "steps", "tokens", "time"]
    note = (
        "The last evaluation of each run, and the mean entropy of trained tokens over the last tenth of the steps, in "
        "nats. Steps, tokens and time are means over seeds, without evaluations."
    )
    return Table("Final held-out reward", note, head, rows)


def _to_reach(tree: Tree, axis: str, format_value: Any) -> Table:
    title = f"{axis.capitalize()} to reach a held-out reward"
    rows = []
    for name, run in tree["runs"].items():
        cells = []
        for reach in run["to_reach"][axis]:
            if reach["on_mean_curve"] is None:
                cells.append("not reached" + _by_seed(reach, format_value))
            else:
                ratio_text = "" if reach["ratio"] is None else f" ×{decimal(reach['ratio'], 2)}"
                cells.append(f"{format_value(reach['on_mean_curve'])}{ratio_text}{_by_seed(reach, format_value)}")
        rows.append([name, *cells])
    if not tree["levels"]:
        return Table(title, "No reward level above the start is reached by all runs.", ["run"], rows)
    note = (
        "Interpolated on the mean curve, which ends where the shortest seed ends. × is the ratio to "
        f"{tree['reference']}; lower is better. In brackets: minimum and maximum over seeds, and the number of seeds "
        "that reached the level."
    )
    return Table(title, note, ["run", *map(decimal, tree["levels"])], rows)


def _by_seed(reach: Tree, format_value: Any) -> str:
    values = [value for value in reach["by_seed"].values() if value is not None]
    num_seeds = len(reach["by_seed"])
    if num_seeds < 2:
        return ""
    if not values:
        return f" (0 of {num_seeds})"
    of_all = "" if len(values) == num_seeds else f", {len(values)} of {num_seeds}"
    return f" ({format_value(min(values))} to {format_value(max(values))}{of_all})"


def _gradients(tree: Tree) -> Table:
    names = ("weighted_squared_advantage", "gradient_variance", "gradient_variance_at_equal_tokens")
    rows = [
        [name, *(_measured(run[one]) for one in names), _mean(run["zero_advantage_share"], _percent)]
        for name, run in tree["runs"].items()
    ]
    head = ["run", "weighted squared advantage", "gradient variance", "variance × tokens", "groups with zero advantage"]
    note = (
        f"Means over all steps and seeds; × is the ratio to {tree['reference']}. The squared advantage is "
        "weighted by squared score norms. Gradient variance is per mini-batch. "
        "Variance × tokens multiplies it by the tokens per step, to compare steps of different sizes."
    )
    return Table("Advantages and gradients", note, head, rows)


def _time(tree: Tree) -> Table:
    rows = [
        [name, *(_mean(run["time_s"][phase], duration) for phase in (*PHASES, "total"))]
        for name, run in tree["runs"].items()
    ]
    note = "Totals of the run, mean over seeds. Phases of steps sampled ahead overlap with other steps."
    return Table("Time per phase", note, ["run", *PHASES, "total"], rows)


def _runs(tree: Tree) -> Table:
    rows = [
        [name, seed, one["state"], str(one["num_steps"]), one["folder"]]
        for name, run in tree["runs"].items()
        for seed, one in run["seeds"].items()
    ]
    return Table("Runs", "", ["run", "seed", "state", "steps", "folder"], rows)


def markdown(tree: Tree) -> str:
    """Return comparison.md."""
    return "\n".join(_markdown_lines(tree)) + "\n"


def plain(tree: Tree) -> str:
    """Return a summary for the terminal: final rewards, and tokens to reach each reward level."""
    return "\n\n".join([headline(tree), *("\n".join([one.title, *_aligned(one)]) for one in tables(tree)[:2])])


def _aligned(table: Table) -> Iterator[str]:
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _markdown_lines(tree: Tree) -> Iterator[str]:
    yield from (f"# {tree['name']}", "", headline(tree))
    for table in tables(tree):
        yield from ("", f"## {table.title}", "")
        if table.note:
            yield from (table.note, "")
        yield from (_markdown_row(table.head), _markdown_row(["---"] * len(table.head)))
        yield from map(_markdown_row, table.rows)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _mean(one: Tree | None, format_value: Any) -> str:
    return format_value(one["mean"]) if one else UNKNOWN


def _measured(one: Tree | None) -> str:
    if one is None:
        return UNKNOWN
    ratio_text = "" if one["ratio"] is None else f" ×{decimal(one['ratio'], 2)}"
    within = f" ({one['low']:.3g} to {one['high']:.3g})" if one["num_seeds"] > 1 else ""
    return f"{one['mean']:.3g}{ratio_text}{within}"


def _range(interval: Tree) -> str:
    return f"{decimal(interval['low'])} to {decimal(interval['high'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
