"""Baselines from sibling rollouts and from the rest of the batch, and the advantages they give.

All of them leave the gradient unbiased: a baseline never depends on the reward of its own rollout. See docs/design.md,
section 2.

Shapes: n rollouts of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def mean_of_others(values_n: Array) -> Array:
    """Return, for every i, the mean over j ≠ i of values_j. Needs n ≥ 2.

    Of probe values it is the cross-rollout baseline `b_i = mean_{j≠i} g_k(z_j)`. Of rewards it is RLOO's baseline and
    the probe's training target. No bit of element i depends on value i: the value is left out of the sum, not
    subtracted from it.

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
    """Return, for every rollout, the mean reward over all other prompts of the batch.

    Unbiased, because rewards of other prompts are independent of this rollout. With a single prompt in the batch it
    falls back to `mean_of_others`.
    """
    if len(rewards_by_group) < 2:
        return [mean_of_others(rewards) for rewards in rewards_by_group]
    sums = np.array([rewards.sum(dtype=np.float64) for rewards in rewards_by_group])
    counts = np.array([rewards.size for rewards in rewards_by_group])
    means = (sums.sum() - sums) / (counts.sum() - counts)
    return [np.full(rewards.shape, mean, np.float32) for rewards, mean in zip(rewards_by_group, means, strict=True)]


def advantages(rewards_n: Array, baselines_n: Array) -> Array:
    """Return A_i = r_i − b_i, not whitened."""
    return (rewards_n - baselines_n).astype(np.float32)
