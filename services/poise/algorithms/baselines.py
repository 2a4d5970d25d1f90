"""Baselines from sibling rollouts or from the rest of the batch, and advantages.

A baseline never depends on the reward of its own rollout, so the gradient stays unbiased.

Shapes: n rollouts of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BIASES: Mapping[str, str] = {
    "own_reward": "the baseline contains the rollout's own reward",
    "standard_deviation": "advantages are divided by a standard deviation that contains the rollout's own reward",
    "dropped_groups": "groups of equal rewards are dropped",
    "gae": "gae_lambda below 1 relies on an inexact critic, and whiten_advantages divides by a standard deviation",
    "token_mean": "the loss is divided by the number of sampled tokens, which is random (loss.aggregation: token_mean)",
    "sequence_mean": "each rollout's loss is divided by its random length (loss.aggregation: sequence_mean)",
}
"""Why the expected gradient of a step differs from that of the mean reward, by name."""


def mean_of_others(values_n: Array) -> Array:
    """Return the mean of values_j over j ≠ i, for every i. Needs n ≥ 2.

    Applied to probe values, it is the cross-rollout baseline `b_i = mean_{j≠i} g_k(z_j)`. Applied to rewards, it is
    RLOO's baseline and the probe's training target. Value i is left out of the sum, not subtracted from it, so no bit
    of element i depends on it.

    Raises:
        ValueError: n < 2.
    """
    n = values_n.shape[0]
    if n < 2:
        raise ValueError(f"the group has {n} rollouts; a baseline from siblings needs at least 2")
    values = values_n.astype(np.float64)
    before, after = np.zeros(n), np.zeros(n)
    before[1:] = values[:-1].cumsum()
    after[:-1] = values[:0:-1].cumsum()[::-1]
    means: Array = ((before + after) / (n - 1)).astype(np.float32)
    return means


def batch_mean(rewards_by_group: Sequence[Array]) -> list[Array]:
    """Return the mean reward of all other prompts in the batch, for every rollout.

    Unbiased, because rewards of other prompts are independent of this rollout. With a single prompt in the batch it
    falls back to `mean_of_others`, and with a single rollout to 0.
    """
    if len(rewards_by_group) < 2:
        return [mean_of_others(rewards) if rewards.size > 1 else np.zeros_like(rewards) for rewards in rewards_by_group]
    sums = np.array([rewards.sum(dtype=np.float64) for rewards in rewards_by_group])
    counts = np.array([rewards.size for rewards in rewards_by_group])
    means = (sums.sum() - sums) / (counts.sum() - counts)
    return [np.full(rewards.shape, mean, np.float32) for rewards, mean in zip(rewards_by_group, means, strict=True)]


def advantages(rewards_n: Array, baselines_n: Array) -> Array:
    """Return A_i = r_i − b_i, not whitened."""
    return (rewards_n - baselines_n).astype(np.float32)
