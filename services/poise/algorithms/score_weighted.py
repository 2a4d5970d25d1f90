"""Score-weighted baselines: mean rewards weighted by the squared score norm, learnt from earlier steps only.

The variance of a policy gradient is E[‖∇log π‖²·(r − b)²] − ‖G‖². The constant that minimises it is
b* = E[‖∇log π‖²·r] / E[‖∇log π‖²], not the mean reward; with inputs that are known before a token is sampled, it is the
weighted regression of the reward on them. The weight of a token is the squared norm of the gradient with respect to the
logits, ‖e_y − π‖² = 1 − 2π(y) + Σ_v π(v)² (compare OTB, arXiv 2602.07078).

A baseline b_t may depend on the prompt, the tokens before t, and earlier steps: then E[∇log π(y_t | s_t)·b_t] = 0.

Shapes: T tokens of one response, p inputs of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

HALF_LIFE_STEPS = 40
"""Steps after which a label counts half: the policy that sampled it has changed."""

PREFIX_INPUTS = (
    "entropy",
    "sum_squares",
    "logprob_sum",
    "logprob_min",
    "probability",
    "probability_min",
    "previous_logprob",
    "log_position",
    "is_first",
    "entropy_sum",
    "surprise",
)
"""Columns of `prefix_inputs`."""

ALPHAS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Ridge penalties that a regression chooses from; a constant is always a candidate."""


def squared_score_norms(logprobs_t: Floats, sum_squares_t: Floats) -> Floats:
    """Return ω_t = 1 − 2π(y_t) + Σ_v π(v)², [T]: the squared norm of the gradient with respect to the logits.

    ω_t is between (1 − π(y_t))² and twice that. Clipping to this range keeps small norms right within a factor of 2,
    although Σ_v π(v)² close to 1 is rounded to 0.0002 in float16.

    Args:
        logprobs_t: log π(y_t) of the sampled tokens.
        sum_squares_t: Σ_v π(v)² of the distribution that each token was sampled from.
    """
    others = -np.expm1(logprobs_t.astype(np.float64))  # 1 − π(y_t)
    norms = 2.0 * others - 1.0 + sum_squares_t.astype(np.float64)
    return np.clip(norms, others**2, 2.0 * others**2).astype(np.float32)


def prefix_inputs(logprobs_t: Floats, entropies_t: Floats, sum_squares_t: Floats) -> Doubles:
    """Return what is known of each token before it is sampled, [T, p].

    Row t depends on log-probabilities before t, and on entropies and Σπ² up to t: those describe the distribution at t,
    not its sample. Columns are `PREFIX_INPUTS`.
    """
    logprobs, entropies = logprobs_t.astype(np.float64), entropies_t.astype(np.float64)
    length = logprobs.size
    before, lowest, previous, entropy_sum = (np.zeros(length) for _ in range(4))
    before[1:] = np.cumsum(logprobs)[:-1]
    lowest[1:] = np.minimum.accumulate(logprobs)[:-1]
    previous[1:] = logprobs[:-1]
    entropy_sum[1:] = np.cumsum(entropies)[:-1]
    positions = np.arange(length)
    return np.stack(
        [
            entropies,
            sum_squares_t.astype(np.float64),
            before,
            lowest,
            np.exp(before),
            np.exp(lowest),
            previous,
            np.log1p(positions),
            (positions == 0).astype(np.float64),
            entropy_sum,
            before + entropy_sum,
        ],
        axis=1,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Weighted second moments of (1, inputs, reward): all that a regression needs to know of its samples."""

    matrix: Doubles
    """Σ ω·ψψᵀ with ψ = (1, φ_1..φ_p, r), [p + 2, p + 2]."""
    num_samples: float
    """How many samples were added."""

    @classmethod
    def empty(cls, num_inputs: int) -> Self:
        """Return the moments of no samples."""
        return cls(np.zeros((num_inputs + 2, num_inputs + 2)), 0.0)

    @classmethod
    def of(cls, inputs: Doubles, rewards: Doubles | float, weights: Floats) -> Self:
        """Return the moments of samples: inputs [N, p], rewards [N] or one for all, weights ω ≥ 0 [N]."""
        samples = np.empty((inputs.shape[0], inputs.shape[1] + 2))
        samples[:, 0], samples[:, 1:-1], samples[:, -1] = 1.0, inputs, rewards
        return cls((samples * weights.astype(np.float64)[:, None]).T @ samples, float(inputs.shape[0]))

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Return the sum of one or more moments, added in the given order."""
        matrix, num_samples = parts[0].matrix.copy(), parts[0].num_samples
        for part in parts[1:]:
            matrix += part.matrix
            num_samples += part.num_samples
        return cls(matrix, num_samples)

    def normalised(self) -> Self:
        """Return the moments with weights divided by their mean, so that every step counts by its samples."""
        weight = self.matrix[0, 0]
        return self if weight <= 0 else type(self)(self.matrix * (self.num_samples / weight), self.num_samples)

    def discounted(self, other: Self, factor: float) -> Self:
        """Return `factor` times these moments, plus the other's."""
        return type(self)(factor * self.matrix + other.matrix, factor * self.num_samples + other.num_samples)

    @property
    def mean_reward(self) -> float:
        """Σ ωr / Σ ω; NaN where nothing has weight."""
        weight = self.matrix[0, 0]
        return float(self.matrix[0, -1] / weight) if weight > 0 else float("nan")

    def error(self, regression: Regression) -> float:
        """Return Σ ω·(r − b)² of an unclipped regression."""
        residual = np.concatenate(([-regression.intercept], -regression.slopes, [1.0]))
        return max(0.0, float(residual @ self.matrix @ residual))


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """A linear baseline, clipped to the range of rewards."""

    intercept: float
    slopes: Doubles
    """[p]."""

    def __call__(self, inputs: Doubles) -> Floats:
        """Return clip(c + β·φ, 0, 1) for inputs [N, p], [N]."""
        return np.clip(self.intercept + inputs @ self.slopes, 0.0, 1.0).astype(np.float32)


def ridge(moments: Moments, alpha: float | None) -> Regression:
    """Return the weighted ridge regression of the reward on standardised inputs; a constant for alpha None.

    Inputs without variance get no slope. Moments without weight give the constant 0.
    """
    matrix, num_inputs = moments.matrix, moments.matrix.shape[0] - 2
    weight = matrix[0, 0]
    if weight <= 0:
        return Regression(0.0, np.zeros(num_inputs))
    means = matrix[0] / weight
    if alpha is None:
        return Regression(float(means[-1]), np.zeros(num_inputs))
    covariance = matrix / weight - np.outer(means, means)
    variances = np.diagonal(covariance)[1:-1]
    varies = variances > 1e-10 * (np.diagonal(matrix)[1:-1] / weight + 1e-300)
    scales = np.where(varies, np.sqrt(np.maximum(variances, 1e-300)), 1.0)
    gram = covariance[1:-1, 1:-1] / np.outer(scales, scales) * weight
    gram[~varies], gram[:, ~varies] = 0.0, 0.0
    target = np.where(varies, covariance[1:-1, -1] / scales * weight, 0.0)
    slopes = np.linalg.solve(gram + alpha * np.eye(num_inputs), target) / scales
    return Regression(float(means[-1] - slopes @ means[1:-1]), slopes)


class ScoreWeighted:
    """One domain's score-weighted regression: learns step by step, and chooses its penalty by earlier predictions."""

    def __init__(self, num_inputs: int, half_life_steps: float = HALF_LIFE_STEPS) -> None:
        self._discount = 0.5 ** (1 / half_life_steps)
        self._moments = Moments.empty(num_inputs)
        self._errors = np.zeros(len(ALPHAS) + 1)

    @property
    def errors(self) -> Doubles:
        """Discounted weighted squared errors of each step's prediction before its labels, by penalty; constant last."""
        return self._errors.copy()

    @property
    def regression(self) -> Regression:
        """The baseline for the next step: of the penalty with the smallest error, the constant at a tie."""
        penalties = (*ALPHAS, None)
        best = len(ALPHAS) - int(np.argmin(self._errors[::-1]))
        return ridge(self._moments, penalties[best])

    def learn(self, step: Moments) -> None:
        """Judge the penalties on a whole step's moments, then add these."""
        normalised = step.normalised()
        if self._moments.matrix[0, 0] > 0:
            own = [normalised.error(ridge(self._moments, alpha)) for alpha in (*ALPHAS, None)]
            self._errors = self._discount * self._errors + np.array(own)
        self._moments = self._moments.discounted(normalised, self._discount)
