"""The paper's probe, fitted from scratch with scikit-learn: the oracle for the project's own fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from poise.value.estimators.features import ENTROPY_MEANS, Doubles, FeatureMatrix, Floats, Label
from poise.value.estimators.probe.model import HIDDEN_INPUTS, FittedProbe, ProbeInput, PromptProbe
from poise.value.estimators.probe.subspace import NEGLIGIBLE_VARIANCE, affordable_components


def training_data(groups: Iterable[Label]) -> tuple[FeatureMatrix, Floats]:
    """Return the inputs and targets of at least one group."""
    listed = list(groups)
    return (
        FeatureMatrix.concatenate([group.inputs for group in listed]),
        np.concatenate([group.targets for group in listed]),
    )


@dataclass(frozen=True, slots=True)
class ReferenceFitter:
    """Fits PCA, standardisation and ridge regression from scratch. Deterministic."""

    inputs: tuple[ProbeInput, ...]
    prompt_components: int
    response_components: int
    alpha: float
    rows_per_component: int = 1

    def fit(self, features: FeatureMatrix, targets: Floats) -> FittedProbe:
        """Fit to rows [n] and targets [n], n ≥ 2.

        Raises:
            ArithmeticError, ValueError: the numbers admit no finite fit.
        """
        weights, bias = self._fit(features, targets)
        prompt_only = None
        if "prompt_hidden" in self.inputs:
            of_prompt, prompt_bias = replace(self, inputs=("prompt_hidden",))._fit(features, targets)
            prompt_only = PromptProbe(of_prompt["prompt_hidden"], prompt_bias)
        return FittedProbe(weights, bias, prompt_only)

    def _fit(self, features: FeatureMatrix, targets: Floats) -> tuple[dict[str, Doubles], float]:
        # The map of each input to its derived columns: x ↦ (x − mean) @ projection.
        maps = {name: self._derive(features, name) for name in self.inputs}
        derived = np.concatenate(
            [(columns_of(features, name) - mean) @ projection for name, (mean, projection) in maps.items()], axis=1
        )
        if derived.shape[1] == 0:  # nothing varies: the best prediction is the mean
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

    def _derive(self, features: FeatureMatrix, name: ProbeInput) -> tuple[Doubles, Doubles]:
        columns = columns_of(features, name)
        if name not in HIDDEN_INPUTS:
            return np.zeros(columns.shape[1]), np.eye(columns.shape[1])
        if not np.ptp(columns, axis=0).any():  # as when no response went through the model
            return columns[0].astype(np.float64), np.zeros((columns.shape[1], 0))
        wanted = self.prompt_components if name == "prompt_hidden" else self.response_components
        affordable = affordable_components(wanted, len(columns), self.rows_per_component)
        pca = PCA(n_components=min(affordable, columns.shape[1]), random_state=0).fit(columns)
        kept = pca.explained_variance_ > NEGLIGIBLE_VARIANCE * pca.explained_variance_[0]
        return pca.mean_.astype(np.float64), pca.components_[kept].T.astype(np.float64)


def columns_of(features: FeatureMatrix, name: ProbeInput) -> Floats:
    """Return the columns of an input."""
    match name:
        case "prompt_hidden":
            return features.prompt_hidden
        case "response_hidden":
            return features.response_hidden
        case "entropy":
            return features.entropies[:, ENTROPY_MEANS]
    assert features.rewards is not None
    return features.rewards[:, None]
