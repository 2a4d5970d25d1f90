"""pass@k: the chance that at least one of k responses to a prompt is correct.

Shapes: P prompts, n rollouts of each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]


def pass_at_k(passed_Pn: ArrayLike, k: int) -> Doubles:
    """Return pass@k of each prompt, [P]: the chance that k of its n rollouts, without replacement, include a pass.

    1 − C(n−c, k) / C(n, k) for c passes. Unbiased, unlike 1 − (1 − c/n)^k (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: k is not in 1..n.
    """
    passed = np.asarray(passed_Pn, bool)
    num_rollouts = passed.shape[1]
    if not 1 <= k <= num_rollouts:
        raise ValueError(f"k is {k}; must be 1 to {num_rollouts}, the number of rollouts of a prompt")
    failed_P = num_rollouts - passed.sum(axis=1)
    # C(n−c, k) / C(n, k) as a product of k factors of at most 1. A factor of 0 means that fewer than k rollouts failed.
    drawn_k = np.arange(k)
    factors_Pk = np.maximum(failed_P[:, None] - drawn_k, 0) / (num_rollouts - drawn_k)
    chance_P: Doubles = 1 - factors_Pk.prod(axis=1)
    return chance_P


def reported_ks(num_rollouts: int) -> list[int]:
    """Return the k for which pass@k is reported: powers of two up to `num_rollouts`."""
    return [2**power for power in range(num_rollouts.bit_length())]
