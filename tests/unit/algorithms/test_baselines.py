"""Baselines against numbers calculated by hand; none depends on its own rollout's reward."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.algorithms.baselines import advantages, batch_mean, mean_of_others

REWARDS = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8)


def test_mean_of_others_by_hand() -> None:
    values_n = np.array([1, 0, 0.5], np.float32)
    np.testing.assert_allclose(mean_of_others(values_n), [0.25, 0.75, 0.5])


def test_two_siblings_swap_their_values() -> None:
    np.testing.assert_array_equal(mean_of_others(np.array([0.3, 0.9], np.float32)), np.array([0.9, 0.3], np.float32))


@pytest.mark.parametrize("n", [0, 1])
def test_a_single_rollout_has_no_siblings(n: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        mean_of_others(np.zeros(n, np.float32))


@given(REWARDS, st.floats(0, 1, width=32), st.data())
def test_no_bit_of_a_baseline_depends_on_its_own_reward(rewards: list[float], other: float, data) -> None:
    own = data.draw(st.integers(0, len(rewards) - 1))
    before = np.array(rewards, np.float32)
    after = before.copy()
    after[own] = other
    assert mean_of_others(before)[own].tobytes() == mean_of_others(after)[own].tobytes()
    others = np.delete(before.astype(np.float64), own)
    assert mean_of_others(before)[own] == pytest.approx(others.mean(), rel=1e-6)


def test_batch_mean_is_over_the_other_prompts() -> None:
    groups = [np.array([1, 1], np.float32), np.array([0, 0.5, 1], np.float32), np.array([0], np.float32)]
    first, second, third = batch_mean(groups)
    np.testing.assert_allclose(first, [1.5 / 4] * 2)
    np.testing.assert_allclose(second, [2 / 3] * 3)
    np.testing.assert_allclose(third, [3.5 / 5])


def test_batch_mean_of_a_single_prompt_uses_the_siblings() -> None:
    (only,) = batch_mean([np.array([1, 0], np.float32)])
    np.testing.assert_array_equal(only, [0, 1])


def test_advantages_are_not_whitened() -> None:
    result = advantages(np.array([1, 0], np.float32), np.array([0.75, 0.75], np.float32))
    np.testing.assert_array_equal(result, np.array([0.25, -0.75], np.float32))
