"""GAE against numbers calculated by hand, and against the paper's sums."""

import math

import numpy as np
import pytest

from poise.algorithms.gae import explained_variance, gae, whitened


def by_the_sums(values, reward, discount, gae_lambda):
    """A_t = Σ_l (γλ)^l·δ_{t+l} of one rollout, each sum on its own."""
    following = [*values[1:], 0.0]
    rewards = [0.0] * (len(values) - 1) + [reward]
    deltas = [r + discount * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((discount * gae_lambda) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(values))]


def test_three_tokens_by_hand():
    # δ = (0.9·0.6 − 0.5, 0.9·0.2 − 0.6, 1 − 0.2) = (0.04, −0.42, 0.8), γλ = 0.45
    # A_3 = 0.8; A_2 = −0.42 + 0.45·0.8 = −0.06; A_1 = 0.04 − 0.45·0.06 = 0.013
    advantages, returns = gae(np.array([0.5, 0.6, 0.2]), np.array([1.0]), np.array([3]), 0.9, 0.5)
    np.testing.assert_allclose(advantages, [0.013, -0.06, 0.8], atol=1e-15)
    np.testing.assert_allclose(returns, [0.513, 0.54, 1.0], atol=1e-15)


def test_lambda_0_uses_only_the_next_value():
    advantages, _ = gae(np.array([0.5, 0.6, 0.2]), np.array([1.0]), np.array([3]), 0.9, 0.0)
    np.testing.assert_allclose(advantages, [0.04, -0.42, 0.8], atol=1e-15)


def test_lambda_1_returns_are_discounted_rewards():
    values = np.random.default_rng(0).normal(0, 1, 5)
    advantages, returns = gae(values, np.array([2.0]), np.array([5]), 0.9, 1.0)
    np.testing.assert_allclose(returns, [2 * 0.9**4, 2 * 0.9**3, 2 * 0.9**2, 2 * 0.9, 2])
    np.testing.assert_allclose(advantages, returns - values)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_one_token_has_advantage_reward_minus_value(gae_lambda):
    advantages, returns = gae(np.array([0.3]), np.array([1.0]), np.array([1]), 0.9, gae_lambda)
    assert (advantages.tolist(), returns.tolist()) == ([0.7], [1.0])


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.97, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_rollouts_do_not_affect_each_other(discount, gae_lambda):
    random = np.random.default_rng(1)
    lengths = np.array([1, 4, 1, 1, 9, 2])
    values, rewards = random.normal(0, 1, lengths.sum()), random.normal(0, 1, lengths.size)
    advantages, returns = gae(values, rewards, lengths, discount, gae_lambda)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    wanted = [by_the_sums(v.tolist(), r, discount, gae_lambda) for v, r in zip(parts, rewards.tolist(), strict=True)]
    np.testing.assert_allclose(advantages, np.concatenate(wanted), rtol=1e-12)
    np.testing.assert_allclose(returns, advantages + values)


def test_a_very_long_rollout_does_not_recurse():
    advantages, _ = gae(np.zeros(50_000), np.array([1.0]), np.array([50_000]), 1.0, 1.0)
    assert (advantages == 1.0).all()


def test_whitened_advantages_have_mean_0_and_variance_1():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    white = whitened(values, 4.0, 5.0)
    np.testing.assert_allclose([white.mean(), white.var()], [0, 1], atol=1e-8)
    assert whitened(np.array([2.0, 2.0]), 2.0, 0.0).tolist() == [0, 0]  # and where they do not vary, nothing


def test_explained_variance_is_1_or_nan_at_its_limits():
    assert explained_variance(0.0, 0.25) == 1
    assert explained_variance(0.25, 0.25) == 0
    assert explained_variance(0.5, 0.25) == -1
    assert math.isnan(explained_variance(0.0, 0.0))
    assert math.isnan(explained_variance(1e-20, 1e-20))
