"""Generalized advantage estimation: token advantages from a critic's values (Schulman et al., arXiv 1506.02438).

Everything is float64.

Shapes: N response tokens of R rollouts, concatenated.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_WHITENING_VARIANCE = 1e-8
"""Added to the variance before the square root."""
_MIN_VARIANCE = 1e-12
"""Below this variance, returns differ only by float32 rounding."""


def gae(
    values_N: Doubles, rewards_R: Doubles, lengths_R: NDArray[np.int64], discount: float, gae_lambda: float
) -> tuple[Doubles, Doubles]:
    """Return the advantages A and the returns A + V of all tokens, [N] each.

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = Σ_l (γλ)^l·δ_{t+l}. V_t is the value of the state before token t, and 0 after
    the last token. r_t is the rollout's reward at its last token and 0 elsewhere. With λ = 1 returns are
    γ^(T−1−t)·reward; with λ = 0 they use only the next value.
    """
    last_R = np.cumsum(lengths_R) - 1
    following_N = np.append(values_N[1:], 0.0)
    following_N[last_R] = 0.0
    deltas_N = discount * following_N - values_N
    deltas_N[last_R] += rewards_R
    decay = discount * gae_lambda
    advantages = []
    for rollout_deltas in np.split(deltas_N, last_R[:-1] + 1):
        backwards = accumulate(reversed(rollout_deltas.tolist()), lambda later, delta: delta + decay * later)
        advantages.append(np.array(list(backwards))[::-1])
    advantages_N = np.concatenate(advantages)
    return advantages_N, advantages_N + values_N


def whitened(advantages_N: Doubles, mean: float, variance: float) -> Doubles:
    """Return (A − mean) / √(variance + 1e-8). Mean and variance are over all tokens of the batch."""
    return (advantages_N - mean) / math.sqrt(variance + _WHITENING_VARIANCE)


def explained_variance(residual_variance: float, return_variance: float) -> float:
    """Return 1 − Var(returns − values) / Var(returns); NaN if the returns do not vary."""
    return 1 - residual_variance / return_variance if return_variance > _MIN_VARIANCE else math.nan
