"""Figures with intervals, tables, plot and JSON of `probe_ablation`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from probe_ablation_data import Domain
from probe_ablation_metrics import FIGURES, Doubles, draws, figures, within_variance
from rich.table import Table

NUM_BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Figure:
    """A figure of one estimator; all domains have equal weight."""

    value: float
    low: float
    high: float
    """Bounds of 95 % of bootstraps over prompts."""
    by_domain: list[float]
    gap: tuple[float, float, float] | None
    """Difference to the reference, and bounds of 95 % of the same bootstraps; None for the reference."""


Report = dict[str, dict[str, Figure]]
"""Figures by estimator and name."""


def report(sums: Mapping[str, Sequence[Doubles]], reference: str) -> Report:
    """Return figures with intervals from each estimator's sums, [P, S] a domain, with the same draws for all."""
    counts = [draws(len(of_domain), NUM_BOOTSTRAPS, seed) for seed, of_domain in enumerate(sums[reference])]
    points, drawn = {}, {}
    for name, by_domain in sums.items():
        points[name] = [figures(s.sum(axis=0)) for s in by_domain]
        resampled = [figures(c @ s) for c, s in zip(counts, by_domain, strict=True)]
        drawn[name] = {key: np.mean([r[key] for r in resampled], axis=0) for key in FIGURES}

    def figure(name: str, key: str) -> Figure:
        by_domain = [float(point[key]) for point in points[name]]
        value = float(np.mean(by_domain))
        gap = None
        if name != reference:
            more = value - float(np.mean([point[key] for point in points[reference]]))
            gap = (more, *_interval(drawn[name][key] - drawn[reference][key]))
        return Figure(value, *_interval(drawn[name][key]), by_domain, gap)

    return {name: {key: figure(name, key) for key in FIGURES} for name in sums}


def _interval(values: Doubles) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def report_table(title: str, found: Report, caption: str) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("")
    for head in ("Pearson", "MAE", "Brier", "Pearson, sibling", "mean A²", "more A² than the reference", "by domain"):
        table.add_column(head, justify="right")
    for name, by_key in found.items():
        pearson, squared = by_key["pearson"], by_key["squared_advantage"]
        table.add_row(
            name,
            "–" if np.isnan(pearson.value) else f"{pearson.value:.3f} [{pearson.low:.2f}, {pearson.high:.2f}]",
            f"{by_key['mae'].value:.3f}",
            f"{by_key['brier'].value:.4f}",
            "–" if np.isnan(pearson.value) else f"{by_key['pearson_sibling'].value:.3f}",
            f"{squared.value:.4f} [{squared.low:.3f}, {squared.high:.3f}]",
            gap_text(squared),
            " ".join(f"{value:.3f}" for value in squared.by_domain),
        )
    return table


def gap_text(figure: Figure) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*figure.gap) if figure.gap else "reference"


def domains_table(domains: Sequence[Domain]) -> Table:
    table = Table(title="what was sampled")
    for head in ("domain", "prompts", "mean reward", "held out", "mean reward", "sd of Avg@16", "A² at best"):
        table.add_column(head, justify="left" if head == "domain" else "right")
    for domain in domains:
        training, held_out = domain.training.rewards, domain.held_out.rewards
        table.add_row(
            domain.name,
            "{} × {}".format(*training.shape),
            f"{training.mean():.3f}",
            "{} × {}".format(*held_out.shape),
            f"{held_out.mean():.3f}",
            f"{held_out.mean(axis=1).std():.3f}",
            f"{within_variance(held_out):.4f}",
        )
    return table


def plot(new: Report, again: Mapping[str, Sequence[Figure]], passes: Sequence[int], best: float, path: Path) -> None:
    """Plot figures on new prompts, and squared advantages on repeated prompts by estimator and `passes`."""
    mpl.rcParams.update({"svg.hashsalt": "poise", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.4), layout="constrained", width_ratios=(1.2, 1, 1.1))
    names = [*reversed(new)]
    for axis, key, label in (
        (axes[0], "squared_advantage", "mean squared advantage, new prompts"),
        (axes[1], "pearson", "Pearson against Avg@8, new prompts"),
    ):
        for place, name in enumerate(names):
            found = new[name][key]
            if not np.isnan(found.value):
                colour = "C0" if name.startswith("probe") else "C7"
                spread = [[found.value - found.low], [found.high - found.value]]
                axis.errorbar(found.value, place, xerr=spread, fmt="o", color=colour, capsize=3)
        axis.set(xlabel=label, ylim=(-0.6, len(names) - 0.4))
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        axis.grid(axis="x", alpha=0.3)
    axes[0].axvline(best, color="C7", linestyle=":")
    for (name, found), marker in zip(again.items(), "os^v", strict=False):
        axes[2].plot(passes, [each.value for each in found], marker=marker, label=name)
    axes[2].axhline(best, color="C7", linestyle=":", label="the prompt's own chance")
    axes[2].set(xlabel="passes before, 2 rollouts each", ylabel="mean squared advantage")
    axes[2].set_xticks(passes)
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def as_json(found: Report) -> Any:
    """Return plain values; NaN becomes null, because JSON has none."""
    plain = {name: {key: asdict(figure) for key, figure in by_key.items()} for name, by_key in found.items()}
    return json.loads(json.dumps(plain), parse_constant=lambda _: None)
