"""The score-weighted regression fitted with scikit-learn, one row per token: the oracle for the project's own fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from poise.algorithms.score_weighted import token_columns


class Step(NamedTuple):
    """The tokens of one step."""

    inputs: np.ndarray
    """[N, p]"""
    rewards: np.ndarray
    """[N]: that of each token's response."""
    weights: np.ndarray
    """[N]"""
    num_responses: int

    @property
    def moments(self) -> np.ndarray:
        """The second moments of (1, inputs, reward), [p + 2, p + 2]."""
        rows = np.column_stack([np.ones(len(self.inputs)), self.inputs, self.rewards])
        return (rows * self.weights.astype(np.float64)[:, None]).T @ rows

    @property
    def normalised_weights(self) -> np.ndarray:
        """The weights, scaled so that they sum to the number of responses."""
        total = self.weights.sum(dtype=np.float64)
        return self.weights * (self.num_responses / total if total else 1.0)


@dataclass(frozen=True)
class Regression:
    """A linear baseline."""

    intercept: float
    slopes: np.ndarray

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return c + β·φ for inputs [N, p]."""
        return self.intercept + inputs @ self.slopes

    def error(self, step: Step) -> float:
        """Return Σ ω̃·(r − b)²."""
        return float(step.normalised_weights @ (step.rewards - self.predict(step.inputs)) ** 2)


def fit(steps: Sequence[Step], alpha: float | None, half_life_steps: float = 40) -> Regression:
    """Return the ridge regression on successive steps, oldest first; the weighted mean reward without a penalty."""
    ages = range(len(steps) - 1, -1, -1)
    weights = [0.5 ** (age / half_life_steps) * step.normalised_weights for age, step in zip(ages, steps, strict=True)]
    inputs, rewards, weights = (
        np.concatenate(arrays)
        for arrays in ([step.inputs for step in steps], [step.rewards for step in steps], weights)
    )
    if alpha is None:
        return Regression(float(np.average(rewards, weights=weights)), np.zeros(inputs.shape[1]))
    scaler = StandardScaler().fit(inputs, sample_weight=weights)
    ridge = Ridge(alpha).fit(scaler.transform(inputs), rewards, sample_weight=weights)
    slopes = ridge.coef_ / scaler.scale_
    return Regression(float(ridge.intercept_ - scaler.mean_ @ slopes), slopes)


def prefix_inputs(logprobs: np.ndarray, entropies: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return the inputs of each token of one response, [T, p]."""
    return token_columns(logprobs, entropies, squares, [logprobs.size])[1:].T
