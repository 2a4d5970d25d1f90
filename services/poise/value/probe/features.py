"""Features of rollouts as matrices, and groups with their rewards: what the probe is fitted on and asked about.

Owns the in-memory layout alone. Shapes: n rows (rollouts), d the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poise.algorithms.baselines import mean_of_others

Floats = NDArray[np.float32]

NUM_ENTROPIES = 12
"""{mean, last, max, min} of {output, reasoning, answer}, the statistic running fastest."""

ENTROPY_MEANS = (0, 4, 8)
"""The columns of the three means."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRows:
    """The features of n rollouts."""

    prompt_hidden: Floats
    """[n, d]"""
    response_hidden: Floats
    """[n, d]"""
    entropies: Floats
    """[n, NUM_ENTROPIES], nats."""
    rewards: Floats | None = None
    """[n], in [0, 1]: each row's *own* reward; None while it is not known."""

    def __len__(self) -> int:
        return len(self.entropies)

    @property
    def width(self) -> int:
        """The model's width d."""
        return int(self.prompt_hidden.shape[1])

    @staticmethod
    def concatenate(parts: Sequence[FeatureRows]) -> FeatureRows:
        """Stack rows in order, with rewards if all parts have them. Needs at least one part, all of one width."""
        rewards = [part.rewards for part in parts if part.rewards is not None]
        return FeatureRows(
            np.concatenate([part.prompt_hidden for part in parts]),
            np.concatenate([part.response_hidden for part in parts]),
            np.concatenate([part.entropies for part in parts]),
            np.concatenate(rewards) if len(rewards) == len(parts) else None,
        )

    def part(self, start: int, end: int, rewards: Floats | None = None) -> FeatureRows:
        """Return the rows [start, end) as views, with rewards of their own or those that are here."""
        if rewards is None and self.rewards is not None:
            rewards = self.rewards[start:end]
        return FeatureRows(
            self.prompt_hidden[start:end], self.response_hidden[start:end], self.entropies[start:end], rewards
        )


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRows:
    """One group whose rewards are known."""

    run_id: str
    step: int
    group_id: str
    domain: str
    rows: FeatureRows
    rewards: Floats
    """[n], in [0, 1], n ≥ 2."""

    @property
    def inputs(self) -> FeatureRows:
        """What the probe may see of row i: its features and its own reward, never another's."""
        return replace(self.rows, rewards=self.rewards)

    @property
    def targets(self) -> Floats:
        """[n]: what the probe learns to predict from row i, the mean reward of the *other* rollouts."""
        return mean_of_others(self.rewards)
