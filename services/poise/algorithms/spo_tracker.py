"""The value of one prompt from its own past rewards: the discounted Beta tracker of SPO (DESIGN §2, rivals).

Owns the rule. Knows neither prompts' names nor where trackers are kept. It needs no features, and knows nothing of a
prompt before that prompt was sampled.

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
    """A Beta distribution over the prompt's chance of a reward. Immutable: what a step saw stays as it was.

    Advantages take `value` as it was *before* the step's rewards entered, or the baseline would hold the reward that
    it is for.
    """

    successes: float
    """α > 0, pseudo-counts of reward."""
    failures: float
    """β > 0, pseudo-counts of reward missed."""

    def __post_init__(self) -> None:
        if not (self.successes > 0 and self.failures > 0 and math.isfinite(self.successes + self.failures)):
            raise ValueError(
                f"pseudo-counts must be positive and finite, not {self.successes:g} and {self.failures:g}: a prior "
                "whose mean is 0 or 1 could only be believed or contradicted for ever"
            )

    @classmethod
    def prior(cls, value: float, strength: float) -> Self:
        """Return what expects `value`, in (0, 1), as firmly as `strength` > 0 observed rollouts would.

        Raises:
            ValueError: either is out of its range.
        """
        return cls(strength * value, strength * (1 - value))

    @property
    def value(self) -> float:
        """v = α/(α+β), in (0, 1)."""
        return self.successes / (self.successes + self.failures)

    def after(self, rewards_n: NDArray[np.float32], discount: float) -> Self:
        """Return the tracker that has seen one visit's rewards: α ← ρα + Σr, β ← ρβ + Σ(1−r).

        The discount ρ in (0, 1] makes what was seen fade as the policy moves away from the one that earned it; at 1
        nothing does, and it keeps 1/(1−ρ) visits in mind. SPO derives it from the KL divergence since the last visit.

        Raises:
            ValueError: a discount or a reward out of its range.
        """
        if not 0 < discount <= 1:
            raise ValueError(f"a discount must be in (0, 1], not {discount:g}")
        rewards = np.asarray(rewards_n, np.float64)
        if not ((rewards >= 0) & (rewards <= 1)).all():
            raise ValueError("rewards must be in [0, 1]")
        earned = float(rewards.sum())
        return type(self)(discount * self.successes + earned, discount * self.failures + rewards.size - earned)
