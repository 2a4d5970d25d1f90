from __future__ import annotations

import numpy as np
import pytest

from poise.report.statistics import bootstrap_interval, paired_interval


def test_the_interval_of_many_prompts_is_normal() -> None:
    rewards = np.random.default_rng(3).normal(0.4, 0.2, (900, 1))
    interval = bootstrap_interval(rewards.tolist())
    half_width = 1.96 * rewards.std() / 30
    assert interval.mean == pytest.approx(rewards.mean())
    assert interval.low == pytest.approx(rewards.mean() - half_width, abs=half_width / 10)
    assert interval.high == pytest.approx(rewards.mean() + half_width, abs=half_width / 10)


def test_intervals_are_over_prompts() -> None:
    one_each = [[1.0]] * 10 + [[0.0]] * 10
    hundred_each = [[1.0] * 100] * 10 + [[0.0] * 100] * 10
    assert bootstrap_interval(hundred_each) == bootstrap_interval(one_each)


def test_prompts_have_equal_weight() -> None:
    assert bootstrap_interval([[1.0], [0.0, 0.0, 0.0]]).mean == 0.5


def test_more_confidence_gives_a_wider_interval() -> None:
    rewards = [[float(index % 2)] for index in range(40)]
    wide, narrow = bootstrap_interval(rewards, confidence=0.99), bootstrap_interval(rewards, confidence=0.8)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_interval_is_reproducible_and_follows_its_seed() -> None:
    rewards = np.random.default_rng(0).random((30, 2)).tolist()
    assert bootstrap_interval(rewards) == bootstrap_interval(rewards)
    assert bootstrap_interval(rewards) != bootstrap_interval(rewards, seed=1)


def test_one_prompt_gives_an_interval_of_zero_width() -> None:
    interval = bootstrap_interval([[0.25, 0.75]])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("rewards", [[], [[], []]])
def test_an_interval_needs_rewards(rewards: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no prompt with a reward"):
        bootstrap_interval(rewards)


def test_pairing_removes_the_spread_between_prompts() -> None:
    before = [[float(index % 2)] for index in range(40)]
    after = [[reward + 0.1] for (reward,) in before]
    difference = paired_interval(before, after)
    assert (difference.low, difference.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert bootstrap_interval(after).low < bootstrap_interval(before).high


def test_paired_difference_ignores_missing_rewards() -> None:
    assert paired_interval([[0.0], [], [0.5]], [[1.0], [1.0], []]).mean == 1.0


def test_paired_difference_needs_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts before and 1 after"):
        paired_interval([[0.0], [1.0]], [[1.0]])
