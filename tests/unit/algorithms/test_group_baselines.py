"""Baselines and scales of each formula, against numbers calculated by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from poise.algorithms.group_baselines import (
    EPSILON,
    ScaledBaselines,
    group_mean,
    length_weighted_mean,
    overlong_penalty,
    rloo,
    whitened,
)

REWARDS = [[1, 0, 0, 1], [1, 1, 1, 1], [0, 1]]
LENGTHS = [[2, 6, 4, 8], [1, 2, 3, 4], [5, 5]]


def arrays(lists: list[list[float]]) -> list[np.ndarray]:
    return [np.array(values, np.float32) for values in lists]


def advantages(rewards: list[list[float]], scaled: ScaledBaselines) -> list[list[float]]:
    assert all(array.dtype == np.float32 for array in (*scaled.baselines, *scaled.scales))
    scales = scaled.scales or [np.ones_like(b) for b in scaled.baselines]
    return [((r - b) / s).tolist() for r, b, s in zip(arrays(rewards), scaled.baselines, scales, strict=True)]


def by_length(rewards: list[np.ndarray]) -> ScaledBaselines:
    return length_weighted_mean(rewards, arrays(LENGTHS))


STD = (1 / 3) ** 0.5 + EPSILON  # of 1, 0, 0, 1 with n - 1 = 3: sum of squares 1
PAIR = 0.5**0.5 + EPSILON
# 10 rewards, 7 of them 1.
WHITE = (0.7 * 0.3) ** 0.5 + EPSILON

EXPECTED: list[tuple[Callable[[list[np.ndarray]], ScaledBaselines], list[list[float]]]] = [
    (rloo, [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0], [-1, 1]]),
    (
        partial(group_mean, divide=True),
        [[0.5 / STD, -0.5 / STD, -0.5 / STD, 0.5 / STD], [0, 0, 0, 0], [-0.5 / PAIR, 0.5 / PAIR]],
    ),
    (partial(group_mean, divide=False), [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.5, 0.5]]),
    # (2 + 8) / 20 = 0.5 of the first group.
    (by_length, [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.5, 0.5]]),
    (
        whitened,
        [[0.3 / WHITE, -0.7 / WHITE, -0.7 / WHITE, 0.3 / WHITE], [0.3 / WHITE] * 4, [-0.7 / WHITE, 0.3 / WHITE]],
    ),
]


@pytest.mark.parametrize(("formula", "expected"), EXPECTED)
def test_advantages_equal_those_calculated_by_hand(
    formula: Callable[[list[np.ndarray]], ScaledBaselines], expected: list[list[float]]
) -> None:
    for mine, theirs in zip(advantages(REWARDS, formula(arrays(REWARDS))), expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_opo_weighs_rewards_by_response_length() -> None:
    def opo(rewards: list[list[float]], lengths: list[list[float]]) -> list[list[float]]:
        return advantages(rewards, length_weighted_mean(arrays(rewards), arrays(lengths)))

    assert opo([[1, 0]], [[9, 1]]) == [pytest.approx([0.1, -0.9])]
    assert opo([[1, 0]], [[0, 0]]) == [pytest.approx([0.5, -0.5])]  # empty responses
    assert opo([[1, 0]], [[0, 7]]) == [pytest.approx([1, 0])]


def test_whitening_uses_rewards_minus_baselines() -> None:
    # 1 - 0.5 and 0 - 0.25: mean 0.125, standard deviation 0.375.
    scaled = whitened(arrays([[1], [0]]), arrays([[0.5], [0.25]]))
    scale = 0.375 + EPSILON
    assert advantages([[1], [0]], scaled) == [
        pytest.approx([0.375 / scale], abs=1e-6),
        pytest.approx([-0.375 / scale], abs=1e-6),
    ]


@pytest.mark.parametrize("reward", [0, 1])
@pytest.mark.parametrize(
    "formula", [rloo, partial(group_mean, divide=True), partial(group_mean, divide=False), whitened]
)
def test_equal_rewards_give_zero_advantages(
    formula: Callable[[list[np.ndarray]], ScaledBaselines], reward: float
) -> None:
    rewards: list[list[float]] = [[reward] * 3, [reward] * 2]
    assert advantages(rewards, formula(arrays(rewards))) == [[0, 0, 0], [0, 0]]


def test_one_rollout_has_no_siblings() -> None:
    with pytest.raises(ValueError, match=r"has 1 rollouts.*needs at least 2"):
        rloo(arrays([[1]]))


def test_overlong_penalty_grows_linearly() -> None:
    lengths = np.array([0, 12, 14, 16, 20, 25], np.float32)
    assert overlong_penalty(lengths, 20, 8).tolist() == [0, 0, -0.25, -0.5, -1, -1]
