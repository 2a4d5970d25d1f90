from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.value.estimators.diagnostics import Diagnostics, ValuedGroup


def group(values: list[float], rewards: list[float], step: int = 0, run_id: str = "run") -> ValuedGroup:
    return ValuedGroup(run_id, step, np.array(values, np.float32), np.array(rewards, np.float32))


def random_groups(num_groups: int = 60) -> list[ValuedGroup]:
    random = np.random.default_rng(0)
    return [
        group(random.random(n).tolist(), random.integers(0, 2, n).tolist(), step=i // 7)
        for i, n in enumerate(random.integers(2, 5, num_groups).tolist())
    ]


def test_all_numbers_are_nan_before_the_first_row() -> None:
    quality = dataclasses.asdict(Diagnostics(10).quality())
    assert quality.pop("num_rows") == 0
    assert quality.pop("calibration") == ()
    assert all(math.isnan(value) for value in quality.values())


def test_values_are_compared_with_the_siblings_rewards() -> None:
    record, groups = Diagnostics(1000), random_groups()
    for one in groups:
        record.add(one)
    predicted = np.concatenate([one.values for one in groups]).astype(float)
    realised = np.concatenate([mean_of_others(one.rewards) for one in groups]).astype(float)
    quality = record.quality()
    assert quality.num_rows == len(record) == predicted.size
    assert quality.brier == pytest.approx(np.mean((predicted - realised) ** 2))
    assert quality.brier_skill == pytest.approx(1 - quality.brier / np.var(realised))
    assert quality.bias == pytest.approx(np.mean(predicted) - np.mean(realised))
    assert quality.pearson == pytest.approx(np.corrcoef(predicted, realised)[0, 1])
    assert sum(one.count for one in quality.calibration) == predicted.size


def test_advantage_variance_is_compared_with_other_baselines() -> None:
    record, groups = Diagnostics(1000), random_groups()
    for one in groups:
        record.add(one)

    def mean_square(baselines: list[np.ndarray]) -> float:
        rewards = np.concatenate([one.rewards for one in groups])
        return float(np.mean((rewards - np.concatenate(baselines)) ** 2, dtype=float))

    by_step: dict[int, list[int]] = {}
    for index, one in enumerate(groups):
        by_step.setdefault(one.step, []).append(index)
    others: list[np.ndarray] = [np.zeros(0)] * len(groups)
    for indices in by_step.values():
        for index, means in zip(indices, batch_mean([groups[i].rewards for i in indices]), strict=True):
            others[index] = means
    used = mean_square([mean_of_others(one.values) for one in groups])
    quality = record.quality()
    assert quality.variance_vs_none == pytest.approx(used / mean_square([0 * one.rewards for one in groups]))
    assert quality.variance_vs_rloo == pytest.approx(used / mean_square([mean_of_others(g.rewards) for g in groups]))
    assert quality.variance_vs_batch_mean == pytest.approx(used / mean_square(others), rel=1e-5)


def test_the_batch_mean_excludes_other_runs() -> None:
    record = Diagnostics(100)
    record.add(group([0.5, 0.5], [1, 0], run_id="a"))
    record.add(group([0.5, 0.5], [1, 1], run_id="b"))
    # Each group is the only one in its step, so the siblings' mean replaces the other prompts' mean.
    assert record.quality().variance_vs_batch_mean == pytest.approx(record.quality().variance_vs_rloo)


def test_a_ratio_to_zero_variance_is_nan() -> None:
    record = Diagnostics(10)
    record.add(group([0.4, 0.6], [1, 1]))
    assert math.isnan(record.quality().variance_vs_rloo)
    assert record.quality().variance_vs_none == pytest.approx((0.4**2 + 0.6**2) / 2)


def test_only_the_newest_whole_groups_count() -> None:
    record = Diagnostics(4)
    for one in (group([1, 1], [0, 0]), group([0.5, 0.5], [1, 1]), group([0.25, 0.25], [1, 1])):
        record.add(one)
    assert len(record) == 4
    assert record.quality().brier == pytest.approx((0.5**2 + 0.75**2) / 2)


def test_restored_diagnostics_give_the_same_numbers() -> None:
    record = Diagnostics(50)
    for one in random_groups():
        record.add(one)
    assert Diagnostics(50, record.groups).quality() == record.quality()


def test_clipped_values_are_counted() -> None:
    record = Diagnostics(10)
    record.add(group([0, 1, 0.5, 0.999], [0, 1, 1, 1]))
    assert record.quality().share_clipped == 0.5
