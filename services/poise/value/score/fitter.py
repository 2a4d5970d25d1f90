"""Fits score-weighted estimators to a window of labels.

A fit depends only on the labels in the window, to the last bit, not on the order in which those of a run arrived: they
are sorted by run, step and group first. Runs are in the order of their first labels in the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise.algorithms.score_weighted import fit_steps, step_moments
from poise.value.probe.features import Label
from poise.value.score.model import FittedScore
from poise_client.types import Estimator


class ScoreFitter:
    """Fits the score-weighted estimators of one domain. It keeps nothing between fits."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator

    def fit(self, groups: Sequence[Label]) -> FittedScore:
        """See `Fitter.fit`."""
        ordered = _ordered(groups)
        packed = np.concatenate([group.moments for group in ordered if group.moments is not None])
        rewards = np.concatenate([group.rewards for group in ordered])
        fit = fit_steps(*step_moments(packed, rewards, _starts(ordered)))
        errors: dict[Estimator, float] = {"score_mean": fit.constant_error, "score_prefix": fit.error}
        coefficients = np.array([fit.regression.intercept, *fit.regression.slopes])
        return FittedScore(self._estimator, coefficients, errors)


def _ordered(groups: Sequence[Label]) -> list[Label]:
    """Return the groups by run, step and id."""
    runs = {run_id: number for number, run_id in enumerate(dict.fromkeys(group.run_id for group in groups))}
    return sorted(groups, key=lambda group: (runs[group.run_id], group.step, group.group_id))


def _starts(ordered: Sequence[Label]) -> list[int]:
    """Return the index of each step's first rollout."""
    starts, row = [], 0
    previous: tuple[str, int] | None = None
    for group in ordered:
        if previous != (group.run_id, group.step):
            starts.append(row)
        previous = group.run_id, group.step
        row += group.rewards.size
    return starts
