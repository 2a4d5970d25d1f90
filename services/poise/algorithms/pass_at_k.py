"""How often a prompt is solved within k attempts: pass@k. numpy only.

Shapes: P prompts, n rollouts of each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]


def pass_at_k(passed_Pn: ArrayLike, k: int) -> Doubles:
    """Return, of each prompt, the chance that k of its n rollouts drawn without replacement hold one that passed, [P].

    1 − C(n−c, k) / C(n, k) for c that passed: unbiased, where 1 − (1 − c/n)^k is not (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: k is not in 1..n.
    """
    passed = np.asarray(passed_Pn, bool)
    num_rollouts = passed.shape[1]
    if not 1 <= k <= num_rollouts:
        raise ValueError(f"k must be in 1 to {num_rollouts}, the rollouts of a prompt, not {k}")
    failed_P = num_rollouts - passed.sum(axis=1)
    # C(n−c, k) / C(n, k) as a product of k factors, none of them large; the first 0 says that k cannot all fail.
    taken_k = np.arange(k)
    factors_Pk = np.maximum(failed_P[:, None] - taken_k, 0) / (num_rollouts - taken_k)
    chance_P: Doubles = 1 - factors_Pk.prod(axis=1)
    return chance_P


def attempt_counts(num_rollouts: int) -> list[int]:
    """Return the k that are told of so many rollouts: powers of two, from 1 up."""
    return [2**power for power in range(num_rollouts.bit_length())]
