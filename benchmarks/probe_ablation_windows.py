"""How well the probe fits small windows: α and dimensions, and whether cross-validation in the window finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from critic import Floats
from probe_ablation_data import Domain
from probe_ablation_estimators import (
    ALPHA,
    COMPONENTS,
    CONSTANT,
    INPUTS,
    REFERENCE,
    ROWS_PER_COMPONENT,
    WITH_REWARD,
    asked,
    fitted,
)
from probe_ablation_metrics import Doubles, other_half, row_sums
from probe_ablation_report import Report, gap_text, report
from rich.table import Table

from poise.value.estimators.features import Label

WINDOWS = (64, 128, 256, 768)
"""Rows a domain."""
ALPHAS = (10.0, 30.0, 100.0, 300.0, 1000.0)
SIZES = ((4, 4), (8, 8), (16, 16), COMPONENTS)
NUM_WINDOWS = 4
"""Number of random windows of each size, if the training prompts hold more than one."""
NUM_FOLDS = 4


@dataclass(frozen=True)
class Fit:
    """One way to fit."""

    inputs: str = REFERENCE
    components: tuple[int, int] = COMPONENTS
    alpha: float = ALPHA
    rows_per_component: int = 1

    def __str__(self) -> str:
        if self.rows_per_component > 1:
            return f"{self.inputs}, α {self.alpha:g}, {self.rows_per_component} rows a dimension"
        return f"{self.inputs}, α {self.alpha:g}, {self.components[0]} + {self.components[1]}"

    def values(self, window: Sequence[Label], groups: Sequence[Label]) -> Floats:
        """Return the values, [P, n], of groups by a probe of the window."""
        probe = fitted(window, INPUTS[self.inputs], self.components, self.alpha, self.rows_per_component)
        return asked(probe, groups)


def tried(inputs: str) -> list[Fit]:
    return [Fit(inputs, size, alpha) for alpha in ALPHAS for size in SIZES]


SEARCHED = (REFERENCE, WITH_REWARD)
"""Inputs for which α and dimensions are searched."""
FRUGAL = [Fit(inputs, rows_per_component=ROWS_PER_COMPONENT) for inputs in SEARCHED]
FITS = [
    *(fit for inputs in SEARCHED for fit in tried(inputs)),
    *(Fit(name) for name in INPUTS if name not in SEARCHED),
    *FRUGAL,
]


def chosen(inputs: str) -> str:
    return f"{inputs}, cross-validated"


def on_windows(domains: Sequence[Domain], num_rows: int) -> Report:
    """Return the figures of probes of random windows on new prompts, by fit, over all windows' rows."""
    sums: dict[str, list[Doubles]] = {}
    for domain in domains:
        rewards, windows = domain.held_out.rewards, random_windows(domain, num_rows)
        values_by_fit = {str(fit): [fit.values(window, domain.held_out.groups) for window in windows] for fit in FITS}
        for inputs in SEARCHED:
            by_window = [str(cross_validated(inputs, window)) for window in windows]
            values_by_fit[chosen(inputs)] = [values_by_fit[fit][place] for place, fit in enumerate(by_window)]
        values_by_fit[CONSTANT] = [np.full_like(rewards, np.mean([g.rewards for g in window])) for window in windows]
        for name, values in values_by_fit.items():
            sums.setdefault(name, []).append(
                np.sum([row_sums(v, rewards, other_half(rewards.shape[1])) for v in values], axis=0)
            )
    return report(sums, str(Fit()))


def random_windows(domain: Domain, num_rows: int) -> list[list[Label]]:
    source = np.random.default_rng(num_rows)
    groups = domain.training.groups
    if num_rows == domain.training.rewards.size:
        return [groups]
    num_groups = num_rows // domain.training.rewards.shape[1]
    return [[groups[i] for i in source.permutation(len(groups))[:num_groups]] for _ in range(NUM_WINDOWS)]


def cross_validated(inputs: str, window: Sequence[Label]) -> Fit:
    """Return the fit with the least squared advantage in cross-validation within the window."""
    fits = tried(inputs)
    losses = np.zeros(len(fits))
    for fold in range(NUM_FOLDS):
        left_out = window[fold::NUM_FOLDS]
        kept = [group for place, group in enumerate(window) if place % NUM_FOLDS != fold]
        targets = np.stack([group.targets for group in left_out])
        losses += [((fit.values(kept, left_out) - targets) ** 2).sum() for fit in fits]
    return fits[int(losses.argmin())]


def windows_table(found: Mapping[int, Report]) -> Table:
    table = Table(title="windows, on new prompts", caption="best: of all tried, by these very prompts")
    for head in ("rows", "fit", "Pearson", "mean A²", "more A² than the paper's fit"):
        table.add_column(head, justify="left" if head == "fit" else "right")
    for num_rows, of_window in found.items():
        best = min(map(str, tried(REFERENCE)), key=lambda name: of_window[name]["squared_advantage"].value)
        shown = {CONSTANT: CONSTANT} | {str(Fit(inputs)): str(Fit(inputs)) for inputs in INPUTS}
        shown |= {str(fit): str(fit) for fit in FRUGAL}
        shown |= {chosen(inputs): chosen(inputs) for inputs in SEARCHED} | {best: f"best: {best}"}
        for name, label in shown.items():
            squared, pearson = of_window[name]["squared_advantage"], of_window[name]["pearson"]
            table.add_row(str(num_rows), label, f"{pearson.value:.3f}", f"{squared.value:.4f}", gap_text(squared))
        table.add_section()
    return table
