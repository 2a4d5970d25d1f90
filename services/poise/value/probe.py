"""The probe g_k: from the features of a rollout to the reward its siblings are expected to get.

Owns fitting and predicting. Knows no windows, versions or steps. PCA of each hidden state, the entropy means beside,
standardised, ridge: every stage is affine, so a fitted probe is stored as the one affine map they amount to, a weight
for each input column and a bias, and predicting is a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from poise.value.rows import ENTROPY_MEANS, FeatureRows, Floats, LabelledRows

ProbeInput = Literal["prompt_hidden", "response_hidden", "entropy"]

Doubles = NDArray[np.float64]

_NEGLIGIBLE_VARIANCE = 1e-10
"""Of a component, as a share of the first one's: below it is rounding noise, which standardising would blow up."""

_BIAS = "bias"


@dataclass(frozen=True, slots=True, eq=False)
class FittedProbe:
    """An affine map of the inputs, clipped to [0, 1]. Immutable, so that any number of steps may pin it."""

    weights: Mapping[str, Doubles]
    """By `ProbeInput`: one weight a column."""
    bias: float

    @property
    def width(self) -> int | None:
        """The model's width it was fitted on; None when no hidden state is among its inputs."""
        hidden = [weights.size for name, weights in self.weights.items() if name != "entropy"]
        return hidden[0] if hidden else None

    def predict(self, rows: FeatureRows) -> Floats:
        """Return the value of each row, [n] in [0, 1].

        A row's value is the same to the last bit whatever rows it is asked with: rows are summed one by one, not
        through a matrix product, whose order of summation depends on the batch.
        """
        values = np.full(len(rows), self.bias)
        for name, weights in self.weights.items():
            values += (_columns(rows, name).astype(np.float64) * weights).sum(axis=1)
        return np.clip(values, 0.0, 1.0).astype(np.float32)

    def arrays(self) -> dict[str, Doubles]:
        """Return all parameters as plain arrays, to be stored."""
        return {**self.weights, _BIAS: np.array([self.bias])}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Doubles]) -> FittedProbe:
        """Rebuild what `arrays` gave."""
        weights = {name: array for name, array in arrays.items() if name != _BIAS}
        return FittedProbe(weights, float(arrays[_BIAS][0]))


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

    def fit(self, rows: FeatureRows, targets: Floats) -> FittedProbe:
        """Fit to rows [n] and targets [n], n ≥ 2. PCA dimensions are capped by rows and width.

        Raises:
            ArithmeticError, ValueError: the numbers admit no finite fit.
        """
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        # Of each input: the map to its derived columns, x ↦ (x − mean) @ projection.
        maps = {name: self._derive(rows, name) for name in self.inputs}
        derived = np.concatenate(
            [(_columns(rows, name) - mean) @ projection for name, (mean, projection) in maps.items()], axis=1
        )
        if derived.shape[1] == 0:  # nothing varies: the best guess is the mean
            return FittedProbe({name: np.zeros(len(mean)) for name, (mean, _) in maps.items()}, float(targets.mean()))
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
        return FittedProbe(weights, bias)

    def _derive(self, rows: FeatureRows, name: ProbeInput) -> tuple[Doubles, Doubles]:
        columns = _columns(rows, name)
        if name == "entropy":
            return np.zeros(columns.shape[1]), np.eye(columns.shape[1])
        if not np.ptp(columns, axis=0).any():  # as when no response went through the model
            return columns[0].astype(np.float64), np.zeros((columns.shape[1], 0))
        from sklearn.decomposition import PCA

        wanted = self.prompt_components if name == "prompt_hidden" else self.response_components
        pca = PCA(n_components=min(wanted, len(columns) - 1, columns.shape[1]), random_state=0).fit(columns)
        kept = pca.explained_variance_ > _NEGLIGIBLE_VARIANCE * pca.explained_variance_[0]
        return pca.mean_.astype(np.float64), pca.components_[kept].T.astype(np.float64)


def _columns(rows: FeatureRows, name: str) -> Floats:
    if name == "prompt_hidden":
        return rows.prompt_hidden
    if name == "response_hidden":
        return rows.response_hidden
    return rows.entropies[:, ENTROPY_MEANS]
