"""SPO's value tracker: a discounted Beta distribution over one prompt's rewards (arXiv 2509.13232).

Shapes: n rollouts of one visit to the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BetaTracker:
    """A Beta distribution over the prompt's expected reward. Immutable.

    A step must read `value` before it adds its own rewards. Otherwise a baseline depends on its rollout's own reward.
    """

    successes: float
    """α > 0, pseudo-counts of reward."""
    failures: float
    """β > 0, pseudo-counts of missed reward."""

    def __post_init__(self) -> None:
        if not (self.successes > 0 and self.failures > 0 and math.isfinite(self.successes + self.failures)):
            raise ValueError(
                f"pseudo-counts are {self.successes:g} and {self.failures:g}; both must be positive and finite. "
                "Choose a prior mean inside (0, 1)"
            )

    @classmethod
    def prior(cls, value: float, strength: float) -> Self:
        """Return a tracker with mean `value` in (0, 1) that weighs as much as `strength` > 0 observed rollouts.

        Raises:
            ValueError: `value` or `strength` is out of range.
        """
        return cls(strength * value, strength * (1 - value))

    @property
    def value(self) -> float:
        """Expected reward α / (α + β), in (0, 1)."""
        return self.successes / (self.successes + self.failures)

    def after(self, rewards_n: NDArray[np.float32], discount: float) -> Self:
        """Return the tracker after one more visit: α ← ρα + Σr, β ← ρβ + Σ(1−r).

        The discount ρ in (0, 1] down-weights rewards that older policies earned: the tracker averages over about
        1/(1−ρ) visits. SPO derives ρ from the KL divergence since the last visit; here it is constant.

        Raises:
            ValueError: the discount or a reward is out of range.
        """
        if not 0 < discount <= 1:
            raise ValueError(f"the discount is {discount:g}; must be in (0, 1]")
        rewards = np.asarray(rewards_n, np.float64)
        if not ((rewards >= 0) & (rewards <= 1)).all():
            raise ValueError("rewards must be in [0, 1]")
        total = float(rewards.sum())
        return type(self)(discount * self.successes + total, discount * self.failures + rewards.size - total)
