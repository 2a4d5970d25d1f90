"""Quality of values, with intervals over prompts: the arithmetic of `probe_ablation`.

A row is one rollout. Its value is the reward that an estimator expects of the prompt's *other* rollouts, and is
compared only with their rewards. Every figure is a function of sums over rows. The sums are kept by prompt, so that a
bootstrap over prompts is a product with the number of times each was drawn.

Shapes: P prompts, n rollouts of each, S sums, B bootstrap draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

FIGURES = ("pearson", "mae", "brier", "pearson_sibling", "squared_advantage")
"""With the mean reward of a row's other rollouts: correlation, mean absolute and squared error. With each of those
rewards: correlation and mean squared advantage."""

_CONSTANT = 1e-12
"""A smaller variance is rounding."""


def others(num_rollouts: int) -> Doubles:
    """Return a mask of the rewards that each row is compared with, [n, n]: all but its own."""
    return 1.0 - np.eye(num_rollouts)


def other_half(num_rollouts: int) -> Doubles:
    """Return a mask of the rewards that each row is compared with, [n, n]: those of the other half."""
    first = np.arange(num_rollouts) < num_rollouts // 2
    return (first[:, None] != first[None, :]).astype(np.float64)


def row_sums(values_Pn: Floats, rewards_Pn: Floats, held_against_nn: Doubles) -> Doubles:
    """Return the sums over each prompt's rows that the figures need, [P, S]."""
    values, rewards = values_Pn.astype(np.float64), rewards_Pn.astype(np.float64)
    shares_nn = held_against_nn / held_against_nn.sum(axis=1, keepdims=True)
    means, mean_squares = rewards @ shares_nn.T, rewards**2 @ shares_nn.T
    columns = (
        np.ones_like(values),
        values,
        values**2,
        means,
        means**2,
        values * means,
        mean_squares,
        np.abs(values - means),
    )
    return np.stack([column.sum(axis=1) for column in columns], axis=1)


def figures(sums: Doubles) -> dict[str, Doubles]:
    """Return `FIGURES` from summed `row_sums` [..., S], each [...]; a constant's correlation is NaN."""
    value, value2, mean, mean2, product, reward2, distance = np.moveaxis(sums[..., 1:] / sums[..., :1], -1, 0)
    variance = value2 - value**2
    covariance = product - value * mean
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.where(variance > _CONSTANT, np.sqrt(np.maximum(variance, 0)), np.nan)
        return {
            "pearson": covariance / (deviation * np.sqrt(mean2 - mean**2)),
            "mae": distance,
            "brier": value2 - 2 * product + mean2,
            "pearson_sibling": covariance / (deviation * np.sqrt(reward2 - mean**2)),
            "squared_advantage": value2 - 2 * product + reward2,
        }


def draws(num_prompts: int, num_draws: int, seed: int) -> Doubles:
    """Return how often each bootstrap draws each prompt, [B, P]."""
    source = np.random.default_rng(seed)
    return source.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_draws).astype(np.float64)


def within_variance(rewards_Pn: Floats) -> float:
    """Return the variance of rewards around their prompt's chance, which the best baseline leaves."""
    return float(rewards_Pn.astype(np.float64).var(axis=1, ddof=1).mean())


def beta_moments(rewards_P2: Floats) -> tuple[float, float]:
    """Return mean and strength (α + β) of the Beta distribution of the prompts' chances, from its moments.

    Siblings covary by as much as chances vary: Cov(r_1, r_2) = Var(p) = m(1−m)/(strength + 1).
    """
    first, second = rewards_P2.astype(np.float64).T
    mean = float(rewards_P2.mean(dtype=np.float64))
    variance = float(np.mean((first - mean) * (second - mean)))
    most = mean * (1 - mean)
    return mean, most / float(np.clip(variance, 0.01 * most, 0.99 * most)) - 1
