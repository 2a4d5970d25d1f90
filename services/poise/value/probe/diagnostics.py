"""How good a domain's values turned out: what was answered before the labels were learnt, against those labels.

Owns the last groups that were valued and then labelled. Shapes: n siblings of a prompt, N rows of all groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from poise.algorithms import prediction_quality
from poise.algorithms.baselines import mean_of_others
from poise.algorithms.prediction_quality import Doubles
from poise.value.probe.features import Floats
from poise_client.types import CalibrationBin, ProbeQuality


@dataclass(frozen=True, slots=True, eq=False)
class ValuedGroup:
    """One group with what the pinned probe said of it, and what became of it."""

    run_id: str
    step: int
    values: Floats
    """[n]: g_k(z_i)."""
    rewards: Floats
    """[n]"""


class TrackRecord:
    """The last groups, whole ones, of at most `max_rows` rows."""

    def __init__(self, max_rows: int, groups: Iterable[ValuedGroup] = (), num_added: int = 0) -> None:
        """Restore from `groups`, oldest first, of which `num_added` in all were ever added."""
        self._max_rows = max_rows
        self._groups: deque[ValuedGroup] = deque()
        self._rows: deque[Doubles] = deque()
        """Of each group, [n, columns of `_row`]: once made, judging all is a few sums."""
        self._num_rows = 0
        self._quality: ProbeQuality | None = None
        self.num_added = 0
        """Groups ever added."""
        for group in groups:
            self.add(group)
        self.num_added = num_added

    def add(self, group: ValuedGroup) -> None:
        """Append a group; the oldest leave."""
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
        """The groups now, oldest first."""
        return tuple(self._groups)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._num_rows

    def quality(self) -> ProbeQuality:
        """Return every number that is known of the values; NaN where it is not defined."""
        if self._quality is None:
            self._quality = self._judge()
        return self._quality

    def _judge(self) -> ProbeQuality:
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, 6))
        predicted, realised, reward, used, group_sum, group_size = rows.T  # realised is RLOO's baseline too
        batch_mean = self._batch_mean(group_sum, group_size, realised)
        variance = _mean_square(reward - used)
        return ProbeQuality(
            num_rows=self._num_rows,
            pearson=prediction_quality.pearson(predicted, realised),
            brier=prediction_quality.mean_squared_error(predicted, realised),
            brier_skill=prediction_quality.brier_skill(predicted, realised),
            bias=prediction_quality.bias(predicted, realised),
            share_clipped=prediction_quality.share_clipped(predicted),
            variance_vs_none=_ratio(variance, _mean_square(reward)),
            variance_vs_rloo=_ratio(variance, _mean_square(reward - realised)),
            variance_vs_batch_mean=_ratio(variance, _mean_square(reward - batch_mean)),
            calibration=tuple(
                CalibrationBin(one.predicted, one.realised, one.count)
                for one in prediction_quality.calibration(predicted, realised)
            ),
        )

    def _batch_mean(self, group_sum_n: Doubles, group_size_n: Doubles, rloo_n: Doubles) -> Doubles:
        """Return the mean reward over the other groups of the row's step, as far as they are in the record, [N].

        The siblings' where there is no other group: as `domain.baselines.batch_mean`.
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


def _row(group: ValuedGroup) -> Doubles:
    """[n, 6]: value, mean reward of the siblings, reward, baseline, the group's sum of rewards and size."""
    n = len(group.values)
    total = np.full(n, group.rewards.sum(dtype=np.float64))
    return np.column_stack(
        [group.values, mean_of_others(group.rewards), group.rewards, mean_of_others(group.values), total, np.full(n, n)]
    ).astype(np.float64)


def _mean_square(advantages: Doubles) -> float:
    return float(np.mean(advantages**2)) if advantages.size else float("nan")


def _ratio(variance: float, other: float) -> float:
    return variance / other if other > 0 else float("nan")
