"""Baselines of other algorithms, from a step's rewards alone (DESIGN §2, rivals). numpy only.

Each returns, of each rollout, what is subtracted from its reward and what the difference is divided by:
A_i = (r_i − b_i) / s_i.

Shapes: n siblings of one prompt; sequences are over the groups of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from poise.algorithms.baselines import Array, mean_of_others

EPSILON = 1e-4
"""Beside every standard deviation that divides: groups of equal rewards give 0, not infinity."""


@dataclass(frozen=True, slots=True)
class Centring:
    """Of a step's groups, [n] each."""

    baselines: list[Array]
    scales: list[Array]


def rloo(rewards: Sequence[Array]) -> Centring:
    """b_i = mean of the siblings' rewards (Ahmadian et al., arXiv 2402.14740). Unbiased. Needs n ≥ 2."""
    return Centring([mean_of_others(r) for r in rewards], _ones(rewards))


def group_mean(rewards: Sequence[Array], *, divide: bool) -> Centring:
    """b = mean of the group; where told to `divide`, s = its standard deviation, with n − 1, else 1. Needs n ≥ 2.

    Divided it is GRPO's (DeepSeekMath, arXiv 2402.03300), undivided Dr. GRPO's (arXiv 2503.20783): (n − 1)/n of RLOO's.
    """
    baselines = [_filled(r, float(r.mean(dtype=np.float64))) for r in rewards]
    if not divide:
        return Centring(baselines, _ones(rewards))
    return Centring(baselines, [_filled(r, float(r.std(ddof=1, dtype=np.float64)) + EPSILON) for r in rewards])


def length_weighted_mean(rewards: Sequence[Array], lengths: Sequence[Array]) -> Centring:
    """b = Σ l_j·r_j / Σ l_j over the group, l the response's tokens (OPO, arXiv 2505.23585): near the optimal baseline.

    Where nobody said anything, the plain mean.
    """
    baselines = []
    for rewards_n, lengths_n in zip(rewards, lengths, strict=True):
        weights_n = lengths_n.astype(np.float64) if lengths_n.sum() else np.ones(lengths_n.shape)
        baselines.append(_filled(rewards_n, float(weights_n @ rewards_n / weights_n.sum())))
    return Centring(baselines, _ones(rewards))


def whitened(rewards: Sequence[Array], baselines: Sequence[Array] | None = None) -> Centring:
    """Whiten r − b over the whole batch: its mean goes to the baseline, its standard deviation to s.

    Without baselines it is REINFORCE++'s (arXiv 2501.03262); with a tracker's, SPO's.
    """
    own = [np.zeros(r.shape, np.float32) for r in rewards] if baselines is None else baselines
    together = np.concatenate([r.astype(np.float64) - b for r, b in zip(rewards, own, strict=True)])
    mean, scale = float(together.mean()), float(together.std()) + EPSILON
    return Centring([(b + mean).astype(np.float32) for b in own], [_filled(r, scale) for r in rewards])


def overlong_penalty(lengths_n: Array, max_tokens: int, margin_tokens: int) -> Array:
    """Return what DAPO adds to the rewards of long responses, in [−1, 0] (arXiv 2503.14476, eq. 13).

    0 up to `max_tokens` − `margin_tokens`, from there on falling linearly to −1 at `max_tokens`, where sampling ends.
    """
    over_n = lengths_n.astype(np.float64) - (max_tokens - margin_tokens)
    return (-np.clip(over_n / margin_tokens, 0, 1)).astype(np.float32)


def _filled(like_n: Array, value: float) -> Array:
    return np.full(like_n.shape, value, np.float32)


def _ones(rewards: Sequence[Array]) -> list[Array]:
    return [np.ones(r.shape, np.float32) for r in rewards]
