"""Online quality of a domain's probe: predictions made before their labels were learnt, compared with these labels.

Shapes: n siblings of a prompt, N rows of all groups.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from poise.algorithms import prediction_quality
from poise.algorithms.baselines import mean_of_others
from poise.algorithms.prediction_quality import Doubles
from poise.value.estimators.features import Floats
from poise_client.types import CalibrationBin, ProbeQuality


@dataclass(frozen=True, slots=True, eq=False)
class ValuedGroup:
    """One group with the predictions of the step's probe and the true rewards."""

    run_id: str
    step: int
    values: Floats
    """[n]: g_k(z_i)."""
    rewards: Floats
    """[n]"""
    weighted: Floats | None = None
    """[2, n]: Σ ω and Σ ω·(r − b)² over the tokens of each rollout. None of a probe's predictions."""


class Diagnostics:
    """The newest valued groups, at most `max_rows` rows. Groups enter and leave whole."""

    def __init__(self, max_rows: int, groups: Iterable[ValuedGroup] = (), num_added: int = 0) -> None:
        """Restore from `groups`, oldest first, and the number of groups ever added."""
        self._max_rows = max_rows
        self._groups: deque[ValuedGroup] = deque()
        self._rows: deque[Doubles] = deque()
        """[n, `_COLUMNS`] per group, so that computing the quality is a few sums."""
        self._num_rows = 0
        self._quality: ProbeQuality | None = None
        self.num_added = 0
        """Groups ever added."""
        for group in groups:
            self.add(group)
        self.num_added = num_added

    def add(self, group: ValuedGroup) -> None:
        """Append a group and drop the oldest ones that no longer fit."""
        self._groups.append(group)
        self._rows.append(_row(group))
        self._num_rows += len(group.values)
        self.num_added += 1
        while self._num_rows > self._max_rows and len(self._groups) > 1:
            self._num_rows -= len(self._groups.popleft().values)
            self._rows.popleft()
        self._quality = None

    @property
    def groups(self) -> tuple[ValuedGroup, ...]:
        """The current groups, oldest first."""
        return tuple(self._groups)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._num_rows

    def quality(self) -> ProbeQuality:
        """Return all quality numbers; NaN where a number is undefined."""
        if self._quality is None:
            self._quality = self._compute()
        return self._quality

    def _compute(self) -> ProbeQuality:
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, len(_COLUMNS)))
        predicted, realised, reward, used, group_sum, group_size, rloo, weight, weighted_square = rows.T
        batch_mean = self._batch_mean(group_sum, group_size, rloo)
        square, batch_mean_square = (reward - used) ** 2, (reward - batch_mean) ** 2
        return ProbeQuality(
            num_rows=self._num_rows,
            pearson=prediction_quality.pearson(predicted, realised),
            brier=prediction_quality.mean_squared_error(predicted, realised),
            brier_skill=prediction_quality.brier_skill(predicted, realised),
            bias=prediction_quality.bias(predicted, realised),
            share_clipped=prediction_quality.share_clipped(predicted),
            variance_vs_none=_ratio(square, reward**2),
            variance_vs_rloo=_ratio(square, (reward - rloo) ** 2),
            variance_vs_batch_mean=_ratio(square, batch_mean_square),
            calibration=tuple(
                CalibrationBin(one.predicted, one.realised, one.count)
                for one in prediction_quality.calibration(predicted, realised)
            ),
            weighted_variance_vs_none=_ratio(weighted_square, weight * reward**2),
            weighted_variance_vs_batch_mean=_ratio(weighted_square, weight * batch_mean_square),
        )

    def _batch_mean(self, group_sum_n: Doubles, group_size_n: Doubles, rloo_n: Doubles) -> Doubles:
        """Return the mean reward of the other stored groups of each row's step, [N].

        Without another group it is the siblings' mean, as in `algorithms.baselines.batch_mean`.
        """
        numbers: dict[tuple[str, int], int] = {}
        steps_G = [numbers.setdefault((group.run_id, group.step), len(numbers)) for group in self._groups]
        sizes_G = np.array([len(group.values) for group in self._groups], int)
        sums_G = np.array([group.rewards.sum(dtype=np.float64) for group in self._groups])
        steps_n = np.repeat(np.array(steps_G, int), sizes_G)
        step_sums = np.bincount(steps_G, sums_G) if steps_G else np.zeros(0)
        step_sizes = np.bincount(steps_G, sizes_G) if steps_G else np.zeros(0)
        other_size_n = step_sizes[steps_n] - group_size_n
        other_sum_n = step_sums[steps_n] - group_sum_n
        has_others = other_size_n > 0
        means: Doubles = np.where(has_others, other_sum_n / np.where(has_others, other_size_n, 1), rloo_n)
        return means


_COLUMNS = (
    "value",
    "realised",  # what the value predicts
    "reward",
    "baseline",
    "sum of the group's rewards",
    "size of the group",
    "mean reward of the siblings",  # NaN for one rollout
    "weight",  # Σ ω; NaN for the probe
    "weighted square",  # Σ ω·(r − b)²
)


def _row(group: ValuedGroup) -> Doubles:
    """Return [n, `_COLUMNS`].

    A probe predicts the mean reward of the siblings, and its baseline is the siblings' mean value. A score-weighted
    estimator predicts the rollout's own reward, which its value never depends on.
    """
    n = len(group.values)
    nothing = np.full(n, np.nan)
    total = np.full(n, group.rewards.sum(dtype=np.float64))
    siblings = mean_of_others(group.rewards) if n > 1 else nothing
    if group.weighted is None:
        realised, baseline, weight, weighted_square = siblings, mean_of_others(group.values), nothing, nothing
    else:
        realised, baseline, (weight, weighted_square) = group.rewards, group.values, group.weighted
    return np.column_stack(
        [group.values, realised, group.rewards, baseline, total, np.full(n, n), siblings, weight, weighted_square]
    ).astype(np.float64)


def _ratio(squares: Doubles, others: Doubles) -> float:
    """Return mean / mean over the rows where both are defined."""
    known = np.isfinite(squares) & np.isfinite(others)
    other = float(np.mean(others[known])) if known.any() else 0.0
    return float(np.mean(squares[known])) / other if other > 0 else math.nan
