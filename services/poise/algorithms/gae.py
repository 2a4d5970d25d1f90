"""Advantages of tokens from a critic's values: generalised advantage estimation (Schulman et al., arXiv 1506.02438).

Pure, float64: numpy in, numpy out.

Shapes: N response tokens, those of one rollout side by side; R rollouts.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_WHITENING_VARIANCE = 1e-8
"""Added to a variance before its root divides."""
_LEAST_VARIANCE = 1e-12
"""Returns that vary less do so by the rounding of float32 values around 1."""


def gae(
    values_N: Doubles, rewards_R: Doubles, lengths_R: NDArray[np.int64], discount: float, gae_lambda: float
) -> tuple[Doubles, Doubles]:
    """Return advantages and returns of tokens, [N] each: δ_t = r_t + γ·V_{t+1} − V_t, A_t = Σ_l (γλ)^l·δ_{t+l}, A + V.

    V_t values the state before token t; r_t is the rollout's reward at its last token and 0 before; V after the last
    token is 0. λ = 1 gives returns of γ^(T−1−t)·reward whatever the values; λ = 0 trusts the next value alone.
    """
    last_R = np.cumsum(lengths_R) - 1
    following_N = np.append(values_N[1:], 0.0)
    following_N[last_R] = 0.0
    deltas_N = discount * following_N - values_N
    deltas_N[last_R] += rewards_R
    decay = discount * gae_lambda
    advantages = []
    for of_rollout in np.split(deltas_N, last_R[:-1] + 1):
        backwards = accumulate(reversed(of_rollout.tolist()), lambda later, delta: delta + decay * later)
        advantages.append(np.array(list(backwards))[::-1])
    advantages_N = np.concatenate(advantages)
    return advantages_N, advantages_N + values_N


def whitened(advantages_N: Doubles, mean: float, variance: float) -> Doubles:
    """Return (A − mean) / √(variance + 1e-8), of a batch whose tokens have this mean and variance."""
    return (advantages_N - mean) / math.sqrt(variance + _WHITENING_VARIANCE)


def explained_variance(residuals: float, returns: float) -> float:
    """Return 1 − Var(returns − values) / Var(returns) of these variances; NaN where returns do not vary."""
    return 1 - residuals / returns if returns > _LEAST_VARIANCE else math.nan
