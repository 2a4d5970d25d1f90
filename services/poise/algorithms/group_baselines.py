"""Baselines and scales of RLOO, GRPO, Dr. GRPO, OPO, REINFORCE++ and SPO, and DAPO's overlong penalty.

Each function returns a baseline b and a scale s for every rollout of a step; the advantage is A_i = (r_i − b_i) / s_i.
See docs/design.md, section 2.

Shapes: n rollouts of one prompt; sequences are over the groups of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from poise.algorithms.baselines import Array, mean_of_others

EPSILON = 1e-4
"""Added to every standard deviation before dividing, so that groups of equal rewards give 0."""


@dataclass(frozen=True, slots=True)
class ScaledBaselines:
    """Baselines and scales of a step's groups, [n] each."""

    baselines: list[Array]
    scales: Sequence[Array] = ()
    """Empty if advantages are not divided."""


def rloo(rewards: Sequence[Array]) -> ScaledBaselines:
    """Return RLOO's b_i, the mean reward of the siblings (Ahmadian et al., arXiv 2402.14740). Unbiased. Needs n ≥ 2."""
    return ScaledBaselines([mean_of_others(r) for r in rewards])


def group_mean(rewards: Sequence[Array], *, divide: bool) -> ScaledBaselines:
    """Return b, the group's mean reward. With `divide`, also s, the sample standard deviation; needs n ≥ 2.

    With `divide` it is GRPO (DeepSeekMath, arXiv 2402.03300), otherwise Dr. GRPO (arXiv 2503.20783). Undivided
    advantages are (n − 1)/n times RLOO's.
    """
    baselines = [_full_like(r, float(r.mean(dtype=np.float64))) for r in rewards]
    if not divide:
        return ScaledBaselines(baselines)
    return ScaledBaselines(
        baselines, [_full_like(r, float(r.std(ddof=1, dtype=np.float64)) + EPSILON) for r in rewards]
    )


def length_weighted_mean(rewards: Sequence[Array], lengths: Sequence[Array]) -> ScaledBaselines:
    """Return b = Σ l_j·r_j / Σ l_j over the group, where l is the response length in tokens (OPO, arXiv 2505.23585).

    If all responses of a group are empty, b is the plain mean.
    """
    baselines = []
    for rewards_n, lengths_n in zip(rewards, lengths, strict=True):
        weights_n = lengths_n.astype(np.float64) if lengths_n.sum() else np.ones(lengths_n.shape)
        baselines.append(_full_like(rewards_n, float(weights_n @ rewards_n / weights_n.sum())))
    return ScaledBaselines(baselines)


def whitened(rewards: Sequence[Array], baselines: Sequence[Array] | None = None) -> ScaledBaselines:
    """Whiten r − b over the whole batch: add its mean to the baseline and divide by its standard deviation.

    Without baselines it is REINFORCE++ (arXiv 2501.03262); with a tracker's baselines it is SPO.
    """
    own = [np.zeros(r.shape, np.float32) for r in rewards] if baselines is None else baselines
    differences = np.concatenate([r.astype(np.float64) - b for r, b in zip(rewards, own, strict=True)])
    mean, scale = float(differences.mean()), float(differences.std()) + EPSILON
    return ScaledBaselines([(b + mean).astype(np.float32) for b in own], [_full_like(r, scale) for r in rewards])


def overlong_penalty(lengths_n: Array, max_tokens: int, margin_tokens: int) -> Array:
    """Return DAPO's reward penalty for long responses, in [−1, 0] (arXiv 2503.14476, eq. 13).

    It is 0 up to `max_tokens` − `margin_tokens` and falls linearly to −1 at `max_tokens`.
    """
    over_n = lengths_n.astype(np.float64) - (max_tokens - margin_tokens)
    return (-np.clip(over_n / margin_tokens, 0, 1)).astype(np.float32)


def _full_like(array_n: Array, value: float) -> Array:
    return np.full(array_n.shape, value, np.float32)
