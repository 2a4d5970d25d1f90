"""Baselines of other algorithms, from a step's rewards alone (DESIGN §2, rivals). numpy only.

Each is a function of the rewards and the lengths of all groups of a step, and returns of each rollout what is
subtracted from its reward and what the difference is divided by: A_i = (r_i − b_i) / s_i. `RIVALS` registers them.

Shapes: n siblings of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from poise.domain.baselines import Array, mean_of_others

EPSILON = 1e-4
"""Beside every standard deviation that divides: groups of equal rewards give 0, not infinity."""


@dataclass(frozen=True, slots=True)
class Centring:
    """Of a step's groups, [n] each."""

    baselines: list[Array]
    scales: list[Array]


Rival = Callable[[Sequence[Array], Sequence[Array]], Centring]
"""Of the rewards, in [0, 1], and the response tokens, ≥ 0, of each group: [n] each, n ≥ 2."""


def rloo(rewards: Sequence[Array], lengths: Sequence[Array]) -> Centring:
    """b_i = mean of the siblings' rewards (Ahmadian et al., arXiv 2402.14740). Unbiased."""
    return Centring([mean_of_others(r) for r in rewards], _ones(rewards))


def grpo(rewards: Sequence[Array], lengths: Sequence[Array]) -> Centring:
    """b = mean of the group, s = its standard deviation, with n − 1 (DeepSeekMath, arXiv 2402.03300)."""
    scales = [_filled(r, r.std(ddof=1, dtype=np.float64) + EPSILON) for r in rewards]
    return Centring(_group_means(rewards), scales)


def dr_grpo(rewards: Sequence[Array], lengths: Sequence[Array]) -> Centring:
    """b = mean of the group, undivided (Dr. GRPO, arXiv 2503.20783): (n − 1)/n of RLOO's advantage."""
    return Centring(_group_means(rewards), _ones(rewards))


def opo(rewards: Sequence[Array], lengths: Sequence[Array]) -> Centring:
    """b = Σ l_j·r_j / Σ l_j over the group, l the response's tokens (OPO, arXiv 2505.23585): near the optimal baseline.

    Where nobody said anything, the plain mean.
    """
    baselines = []
    for rewards_n, lengths_n in zip(rewards, lengths, strict=True):
        weights_n = lengths_n.astype(np.float64) if lengths_n.sum() else np.ones(lengths_n.shape)
        baselines.append(_filled(rewards_n, float(weights_n @ rewards_n / weights_n.sum())))
    return Centring(baselines, _ones(rewards))


def reinforce_pp(rewards: Sequence[Array], lengths: Sequence[Array]) -> Centring:
    """Whitened over the whole batch: b its mean, s its standard deviation (REINFORCE++, arXiv 2501.03262)."""
    together = np.concatenate(rewards).astype(np.float64)
    mean, scale = float(together.mean()), float(together.std()) + EPSILON
    return Centring([_filled(r, mean) for r in rewards], [_filled(r, scale) for r in rewards])


RIVALS: Mapping[str, Rival] = MappingProxyType(
    {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo, "opo": opo, "reinforce_pp": reinforce_pp}
)
"""By the name that `algorithm` takes."""


def _group_means(rewards: Sequence[Array]) -> list[Array]:
    return [_filled(r, float(r.mean(dtype=np.float64))) for r in rewards]


def _filled(like_n: Array, value: float) -> Array:
    return np.full(like_n.shape, value, np.float32)


def _ones(rewards: Sequence[Array]) -> list[Array]:
    return [np.ones(r.shape, np.float32) for r in rewards]
