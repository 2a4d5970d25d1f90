"""The probe g_k: from the features of a rollout to the reward its siblings are expected to get.

Owns fitting and predicting. Knows no windows, versions or steps. PCA of each hidden state, the scalars beside (entropy
means; the reward, if chosen), standardised, ridge: every stage is affine, so a fitted probe is stored as the one affine
map they amount to, a weight for each input column and a bias, and predicting is a product.

**The sibling's reward as an input keeps the gradient unbiased.** With `sibling_reward` a row's own reward joins its
features, and rollout i gets b_i = mean_{j≠i} g(z_j, r_j). Fix the prompt x, and g, which has seen no label of the step.
The n rollouts are drawn independently given x, and r_j is a function of y_j and of chance that is not y_i's; so all
(z_j, r_j) with j ≠ i, and b_i with them, are independent of y_i. Therefore

    E[∇log π(y_i|x)·b_i] = E[∇log π(y_i|x)]·E[b_i] = 0,    for    E[∇log π(y_i|x)] = Σ_y ∇π(y|x) = ∇1 = 0,

and E[∇log π(y_i|x)·(r_i − b_i)] = E[∇log π(y_i|x)·r_i], the gradient itself. Nothing but the independence was used: not
how good g is, nor what it looks at in rollout j. What breaks it is g(z_i, r_i) in b_i: it follows y_i. That value is an
input to the *others'* baselines alone, which `domain.baselines.mean_of_others` sees to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from poise.value.probe.features import ENTROPY_MEANS, FeatureRows, Floats, LabelledRows
from poise.value.probe.subspace import affordable_components

ProbeInput = Literal["prompt_hidden", "response_hidden", "entropy", "sibling_reward"]

HIDDEN_INPUTS = ("prompt_hidden", "response_hidden")
"""Those that are reduced to principal components; the others enter as they are."""

Doubles = NDArray[np.float64]

_NEGLIGIBLE_VARIANCE = 1e-10
"""Of a component, as a share of the first one's: below it is rounding noise, which standardising would blow up."""

_ROWS_AT_ONCE = 16
"""As doubles, more would not fit the processor's cache."""
_COLUMNS_AT_ONCE = 8192
"""More than 10,000, BLAS sums by as many threads as it may use just then, and their number tells in the last bit."""

_BIAS, _PROMPT_WEIGHTS, _PROMPT_BIAS = "bias", "prompt_only_weights", "prompt_only_bias"


@dataclass(frozen=True, slots=True, eq=False)
class PromptProbe:
    """An affine map of the prompt's state alone, clipped to [0, 1]: the reward to expect before any rollout."""

    weights_d: Doubles
    bias: float

    def predict(self, prompt_hidden_nd: Floats) -> Floats:
        """Return the value of each prompt, [n] in [0, 1]; as with `FittedProbe.predict`, whatever it is asked with."""
        return np.clip(_products(prompt_hidden_nd, self.weights_d) + self.bias, 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class FittedProbe:
    """An affine map of the inputs, clipped to [0, 1]. Immutable, so that any number of steps may pin it."""

    weights: Mapping[str, Doubles]
    """By `ProbeInput`: one weight a column."""
    bias: float
    prompt_only: PromptProbe | None = None
    """Fitted to the same rows and targets from `prompt_hidden` alone; None when that is not among the inputs."""

    @property
    def needs_rewards(self) -> bool:
        """Whether rows without rewards have no value."""
        return "sibling_reward" in self.weights

    @property
    def width(self) -> int | None:
        """The model's width it was fitted on; None when no hidden state is among its inputs."""
        hidden = [weights.size for name, weights in self.weights.items() if name in HIDDEN_INPUTS]
        return hidden[0] if hidden else None

    def predict(self, rows: FeatureRows) -> Floats:
        """Return the value of each row, [n] in [0, 1].

        A row's value is the same to the last bit whatever rows it is asked with: rows are summed one by one, not
        through a matrix product, whose order of summation depends on the batch. And whether the probe was fitted here
        or read back: inputs are summed in the order of their names, for that of `weights` does not survive storing.

        Raises:
            ValueError: `needs_rewards`, and the rows have none.
        """
        values = np.full(len(rows), self.bias)
        for name in sorted(self.weights):
            values += _products(_columns(rows, name), self.weights[name])
        return np.clip(values, 0.0, 1.0).astype(np.float32)

    def arrays(self) -> dict[str, Doubles]:
        """Return all parameters as plain arrays, to be stored."""
        arrays: dict[str, Doubles] = {**self.weights, _BIAS: np.array([self.bias])}
        if self.prompt_only is not None:
            arrays[_PROMPT_WEIGHTS] = self.prompt_only.weights_d
            arrays[_PROMPT_BIAS] = np.array([self.prompt_only.bias])
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, Doubles]) -> FittedProbe:
        """Rebuild what `arrays` gave."""
        weights = dict(arrays)
        bias = float(weights.pop(_BIAS)[0])
        prompt_only = None
        if _PROMPT_WEIGHTS in weights:
            prompt_only = PromptProbe(weights.pop(_PROMPT_WEIGHTS), float(weights.pop(_PROMPT_BIAS)[0]))
        return FittedProbe(weights, bias, prompt_only)


class ProbeFitter(Protocol):
    """Fits the probes of one domain, one after the other. Called in a thread of its own, beside queries."""

    def fit(self, groups: Sequence[LabelledRows]) -> FittedProbe:
        """Fit to the groups of a window, at least one. May keep them, and what it made of them, for the next fit.

        Raises:
            ArithmeticError, ValueError: the numbers admit no finite fit.
        """
        ...


@dataclass(frozen=True, slots=True)
class RidgeFitter:
    """The paper's probe from scratch, by scikit-learn: what faster fitters are held to. Deterministic."""

    inputs: tuple[ProbeInput, ...]
    prompt_components: int
    response_components: int
    alpha: float
    rows_per_component: int = 1

    def fit(self, rows: FeatureRows, targets: Floats) -> FittedProbe:
        """Fit to rows [n] and targets [n], n ≥ 2. PCA dimensions are capped by what rows can bear, and by width.

        Raises:
            ArithmeticError, ValueError: the numbers admit no finite fit; or rows without rewards that are an input.
        """
        weights, bias = self._fit(rows, targets)
        prompt_only = None
        if "prompt_hidden" in self.inputs:
            of_prompt, prompt_bias = replace(self, inputs=("prompt_hidden",))._fit(rows, targets)
            prompt_only = PromptProbe(of_prompt["prompt_hidden"], prompt_bias)
        return FittedProbe(weights, bias, prompt_only)

    def _fit(self, rows: FeatureRows, targets: Floats) -> tuple[dict[str, Doubles], float]:
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        # Of each input: the map to its derived columns, x ↦ (x − mean) @ projection.
        maps = {name: self._derive(rows, name) for name in self.inputs}
        derived = np.concatenate(
            [(_columns(rows, name) - mean) @ projection for name, (mean, projection) in maps.items()], axis=1
        )
        if derived.shape[1] == 0:  # nothing varies: the best guess is the mean
            return {name: np.zeros(len(mean)) for name, (mean, _) in maps.items()}, float(targets.mean())
        scaler = StandardScaler().fit(derived)
        ridge = Ridge(alpha=self.alpha).fit(scaler.transform(derived), targets.astype(np.float64))

        coefficients = ridge.coef_ / scaler.scale_
        bias = float(ridge.intercept_ - scaler.mean_ @ coefficients)
        weights: dict[str, Doubles] = {}
        offset = 0
        for name, (mean, projection) in maps.items():
            num_derived = projection.shape[1]
            weights[name] = projection @ coefficients[offset : offset + num_derived]
            bias -= float(mean @ weights[name])
            offset += num_derived
        if not np.isfinite(bias) or not all(np.isfinite(array).all() for array in weights.values()):
            raise ArithmeticError("the fit gave parameters that are not finite")
        return weights, bias

    def _derive(self, rows: FeatureRows, name: ProbeInput) -> tuple[Doubles, Doubles]:
        columns = _columns(rows, name)
        if name not in HIDDEN_INPUTS:
            return np.zeros(columns.shape[1]), np.eye(columns.shape[1])
        if not np.ptp(columns, axis=0).any():  # as when no response went through the model
            return columns[0].astype(np.float64), np.zeros((columns.shape[1], 0))
        from sklearn.decomposition import PCA

        wanted = self.prompt_components if name == "prompt_hidden" else self.response_components
        affordable = affordable_components(wanted, len(columns), self.rows_per_component)
        pca = PCA(n_components=min(affordable, columns.shape[1]), random_state=0).fit(columns)
        kept = pca.explained_variance_ > _NEGLIGIBLE_VARIANCE * pca.explained_variance_[0]
        return pca.mean_.astype(np.float64), pca.components_[kept].T.astype(np.float64)


def _columns(rows: FeatureRows, name: str) -> Floats:
    """Return what a `ProbeInput` sees of the rows, [n, its columns].

    Raises:
        ValueError: `sibling_reward`, of rows without rewards.
    """
    match name:
        case "prompt_hidden":
            return rows.prompt_hidden
        case "response_hidden":
            return rows.response_hidden
        case "entropy":
            return rows.entropies[:, ENTROPY_MEANS]
        case "sibling_reward" if rows.rewards is not None:
            return rows.rewards[:, None]
    raise ValueError(f"the rows hold no {name}")


def _products(columns: Floats, weights: Doubles) -> Doubles:
    """Return each row's product with the weights, [n], summed row by row."""
    products = np.zeros(len(columns))
    for start in range(0, len(columns), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        block = columns[rows].astype(np.float64, order="C")
        for first in range(0, len(weights), _COLUMNS_AT_ONCE):
            part = slice(first, first + _COLUMNS_AT_ONCE)
            products[rows] += np.vecdot(block[:, part], weights[part])
    return products
