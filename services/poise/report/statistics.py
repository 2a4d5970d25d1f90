"""Bootstrap intervals of held-out rewards.

The percentile bootstrap resamples prompts, because rollouts of one prompt are not independent. Each prompt counts as
the mean of its rewards. The intervals cover both the choice of prompts and the sampling of rollouts. If all prompts
have the same mean, the interval has zero width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    rewards_by_prompt: Sequence[Sequence[float]], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean reward over prompts with its interval. Prompts without rewards are ignored.

    Raises:
        ValueError: no prompt has a reward.
    """
    means_P = _prompt_means(rewards_by_prompt)
    return mean_interval(means_P[~np.isnan(means_P)], confidence, resamples, seed)


def paired_interval(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of after − before over the same prompts, in the same order, with its interval.

    Pairing removes the variation between easy and hard prompts. Prompts without rewards on either side are ignored.

    Raises:
        ValueError: the numbers of prompts differ, or no prompt has rewards on both sides.
    """
    if len(before) != len(after):
        raise ValueError(
            f"there are {len(before)} prompts before and {len(after)} after; a paired difference needs the same prompts"
        )
    differences_P = _prompt_means(after) - _prompt_means(before)
    return mean_interval(differences_P[~np.isnan(differences_P)], confidence, resamples, seed)


def mean_interval(values_P: Doubles, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean over prompts with its percentile-bootstrap interval.

    Raises:
        ValueError: there is no value.
    """
    if values_P.size == 0:
        raise ValueError("there is no prompt with a reward; an interval needs at least one")
    draws_RP = np.random.default_rng(seed).integers(0, values_P.size, (resamples, values_P.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values_P[draws_RP].mean(axis=1), [tail, 1 - tail])
    return Interval(float(values_P.mean()), float(low), float(high))


def _prompt_means(rewards_by_prompt: Sequence[Sequence[float]]) -> Doubles:
    return np.array([np.mean(rewards) if len(rewards) else np.nan for rewards in rewards_by_prompt], np.float64)
