"""Rivals' advantages, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from poise.domain.rivals import EPSILON, RIVALS

REWARDS = [[1, 0, 0, 1], [1, 1, 1, 1], [0, 1]]
LENGTHS = [[2, 6, 4, 8], [1, 2, 3, 4], [5, 5]]


def advantages(name: str, rewards: list[list[float]], lengths: list[list[float]]) -> list[list[float]]:
    arrays = [np.array(r, np.float32) for r in rewards]
    centring = RIVALS[name](arrays, [np.array(n, np.float32) for n in lengths])
    assert all(b.dtype == s.dtype == np.float32 for b, s in zip(centring.baselines, centring.scales, strict=True))
    return [((r - b) / s).tolist() for r, b, s in zip(arrays, centring.baselines, centring.scales, strict=True)]


STD = (1 / 3) ** 0.5 + EPSILON  # of 1, 0, 0, 1 with n - 1 = 3: sum of squares 1
PAIR = 0.5**0.5 + EPSILON
# 10 rewards, 7 of them 1.
WHITE = (0.7 * 0.3) ** 0.5 + EPSILON

EXPECTED = {
    "rloo": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0], [-1, 1]],
    "grpo": [[0.5 / STD, -0.5 / STD, -0.5 / STD, 0.5 / STD], [0, 0, 0, 0], [-0.5 / PAIR, 0.5 / PAIR]],
    "dr_grpo": [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.5, 0.5]],
    # (2 + 8) / 20 = 0.5 of the first group.
    "opo": [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.5, 0.5]],
    "reinforce_pp": [
        [0.3 / WHITE, -0.7 / WHITE, -0.7 / WHITE, 0.3 / WHITE],
        [0.3 / WHITE] * 4,
        [-0.7 / WHITE, 0.3 / WHITE],
    ],
}


@pytest.mark.parametrize("name", RIVALS)
def test_advantages_are_those_worked_out_by_hand(name: str) -> None:
    for mine, expected in zip(advantages(name, REWARDS, LENGTHS), EXPECTED[name], strict=True):
        assert mine == pytest.approx(expected, abs=1e-6)


def test_long_responses_weigh_more_in_opos_baseline() -> None:
    assert advantages("opo", [[1, 0]], [[9, 1]]) == [pytest.approx([0.1, -0.9])]
    assert advantages("opo", [[1, 0]], [[0, 0]]) == [pytest.approx([0.5, -0.5])]  # empty responses
    assert advantages("opo", [[1, 0]], [[0, 7]]) == [pytest.approx([1, 0])]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("reward", [0, 1])
def test_equal_rewards_everywhere_teach_nothing_and_divide_by_nothing(name: str, reward: float) -> None:
    assert advantages(name, [[reward] * 3, [reward] * 2], [[1, 0, 5], [2, 2]]) == [[0, 0, 0], [0, 0]]


def test_one_rollout_has_no_siblings() -> None:
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        advantages("rloo", [[1]], [[3]])
