"""Incremental PCA and ridge regression: refits the probe of a sliding window at the cost of the changed rows.

The principal components of each hidden state are updated, not recomputed (see `subspace`). Each row then has a few
coordinates in these bases. The sums of products of the coordinates are kept up to date, and the standardised ridge
regression follows from them.

This state is in memory only; after a restart it is recomputed from the window. With l = components + 48 it takes
(8·n + 16·d)·l bytes per hidden input. At n = 4096, d = 2560 and the default components that is 14 MB per domain, beside
84 MB for the window.

Shapes: n rows, d the model's width, m columns: coordinates in each hidden input's basis, scalars, target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from threadpoolctl import ThreadpoolController

from poise.value.estimators.features import ENTROPY_MEANS, Doubles, Floats, Label
from poise.value.estimators.probe.model import HIDDEN_INPUTS, FittedProbe, ProbeInput, PromptProbe
from poise.value.estimators.probe.subspace import Subspace

_SCALAR_COLUMNS = {"entropy": len(ENTROPY_MEANS), "sibling_reward": 1}

_ROUNDING = 1e-7
"""A standard deviation below this fraction of the column's mean counts as zero."""


class IncrementalFitter:
    """Fits the probes of one domain. Deterministic.

    The same sequence of fits gives the same probes. With `incremental=False`, a probe depends only on the groups and
    their order.
    """

    def __init__(
        self,
        inputs: tuple[ProbeInput, ...],
        prompt_components: int,
        response_components: int,
        alpha: float,
        rows_per_component: int = 1,
        *,
        incremental: bool = True,
    ) -> None:
        self._inputs = inputs
        self._scalars = [name for name in inputs if name not in HIDDEN_INPUTS]
        self._prompt_components = prompt_components
        self._response_components = response_components
        self._alpha = alpha
        self._rows_per_component = rows_per_component
        self._incremental = incremental
        self._threads = ThreadpoolController()
        self._reset()

    def _reset(self) -> None:
        components = {"prompt_hidden": self._prompt_components, "response_hidden": self._response_components}
        self._subspaces: dict[str, Subspace] = {
            name: Subspace(components[name], self._rows_per_component) for name in self._inputs if name in HIDDEN_INPUTS
        }
        self._fitted: dict[int, tuple[Label, Doubles]] = {}
        """The groups of the last fit by identity, each with the coordinates of its rows, [n, m]."""
        self._num_rows = self._num_rows_added = 0
        self.num_fits_since_rebuild = 0
        """0 if the last fit was a rebuild, which passes over all rows."""
        self._sum: Doubles = np.zeros(0)
        self._products: Doubles = np.zeros((0, 0))

    def fit(self, groups: Sequence[Label]) -> FittedProbe:
        """See `Fitter.fit`. Groups are compared by identity, so a group must not change between fits."""
        if not self._incremental:
            self._reset()
        try:
            # One thread: with such small products, more threads mostly wait for each other, and queries need the
            # other cores. Non-finite results are rejected at the end.
            with self._threads.limit(limits=1), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                return self._fit(groups)
        except Exception:
            self._reset()  # the state is half updated
            raise

    def _fit(self, groups: Sequence[Label]) -> FittedProbe:
        now = {id(group) for group in groups}
        removed = [group for group, _ in self._fitted.values() if id(group) not in now]
        added = [group for group in groups if id(group) not in self._fitted]
        num_rows = sum(len(group.features) for group in groups)
        self._num_rows_added += sum(len(group.features) for group in added)
        fits = all(subspace.fits(_hidden(groups, name)) for name, subspace in self._subspaces.items())
        # Once the whole window was replaced, the bases are for rows that no longer exist.
        if not self._fitted or not fits or self._num_rows_added >= num_rows:
            self._rebuild(groups)
            return self._solve()
        self.num_fits_since_rebuild += 1
        self._remove(removed)
        self._add(added, {name: subspace.add(_hidden(added, name)) for name, subspace in self._subspaces.items()})
        probe = self._solve()
        if any(subspace.outdated for subspace in self._subspaces.values()):
            self._rebuild(groups)
            probe = self._solve()
        return probe

    def _rebuild(self, groups: Sequence[Label]) -> None:
        hidden = {name: subspace.rebuild(_hidden(groups, name)) for name, subspace in self._subspaces.items()}
        self._fitted, self._num_rows, self._num_rows_added, self.num_fits_since_rebuild = {}, 0, 0, 0
        self._sum, self._products = np.zeros(()), np.zeros(())
        self._add(groups, hidden)

    def _add(self, groups: Sequence[Label], hidden: Mapping[str, Doubles]) -> None:
        if not groups:
            return
        scalars = [_scalars(groups, name) for name in self._scalars]
        targets = np.concatenate([group.targets for group in groups]).astype(np.float64)
        coordinates = np.column_stack([*hidden.values(), *scalars, targets])
        self._update_sums(coordinates, 1)
        start = 0
        for group in groups:
            self._fitted[id(group)] = group, coordinates[start : start + len(group.features)]
            start += len(group.features)

    def _remove(self, groups: Sequence[Label]) -> None:
        if not groups:
            return
        coordinates = np.concatenate([self._fitted.pop(id(group))[1] for group in groups])
        self._update_sums(coordinates, -1)
        start = 0
        for name, subspace in self._subspaces.items():
            end = start + subspace.basis.shape[1]
            subspace.remove(_hidden(groups, name), coordinates[:, start:end])
            start = end

    def _update_sums(self, coordinates: Doubles, sign: int) -> None:
        self._num_rows += sign * len(coordinates)
        self._sum = self._sum + sign * coordinates.sum(axis=0)
        self._products = self._products + sign * (coordinates.T @ coordinates)

    def _solve(self) -> FittedProbe:
        """Return the probe, including the prompt-only probe, which uses a part of the same sums."""
        mean = self._sum / self._num_rows
        scatter = self._products - self._num_rows * np.outer(mean, mean)
        maps: dict[str, Doubles] = {}
        start = 0
        prompt_only = None
        for name, subspace in self._subspaces.items():
            columns = slice(start, start + subspace.basis.shape[1])
            maps[name] = subspace.rotation(scatter[columns, columns], mean[columns], self._num_rows)
            start = columns.stop
            if name == "prompt_hidden":
                prompt_columns = np.r_[columns, -1]
                weights, bias = self._regress(
                    {name: maps[name]}, mean[prompt_columns], scatter[np.ix_(prompt_columns, prompt_columns)]
                )
                prompt_only = PromptProbe(weights[name], bias)
        maps |= {name: np.eye(_SCALAR_COLUMNS[name]) for name in self._scalars}
        return FittedProbe(*self._regress(maps, mean, scatter), prompt_only)

    def _regress(
        self, maps: Mapping[str, Doubles], mean: Doubles, scatter: Doubles
    ) -> tuple[dict[str, Doubles], float]:
        """Regress the targets on standardised components and scalars; return weights and bias.

        `maps` contains each input's map from coordinates to components. The last entry of `mean` [m] and `scatter`
        [m, m] is the target.
        """
        projection = _block_diagonal([*maps.values()])  # [m − 1, columns of the regression]
        variances = projection.T @ scatter[:-1, :-1] @ projection
        scale = np.sqrt(np.maximum(variances.diagonal(), 0) / self._num_rows)
        # For a constant column the subtraction leaves only rounding errors. A scale of 1 keeps them small.
        scale[scale <= _ROUNDING * np.abs(mean[:-1] @ projection)] = 1.0
        penalised = variances / np.outer(scale, scale) + self._alpha * np.eye(len(scale))
        coefficients = projection @ (np.linalg.solve(penalised, projection.T @ scatter[:-1, -1] / scale) / scale)

        bias = float(mean[-1] - mean[:-1] @ coefficients)
        weights: dict[str, Doubles] = {}
        start = 0
        for name, rotation in maps.items():
            own = coefficients[start : start + len(rotation)]
            start += len(rotation)
            if name in self._subspaces:
                subspace = self._subspaces[name]
                weights[name] = subspace.basis @ own
                bias -= float(subspace.origin @ weights[name])
            else:
                weights[name] = own
        if not np.isfinite(bias) or not all(np.isfinite(array).all() for array in weights.values()):
            raise ArithmeticError("the fit gave parameters that are not finite")
        return weights, bias


def _hidden(groups: Sequence[Label], name: str) -> list[Floats]:
    if name == "prompt_hidden":
        return [group.features.prompt_hidden for group in groups]
    return [group.features.response_hidden for group in groups]


def _scalars(groups: Sequence[Label], name: str) -> Floats:
    if name == "entropy":
        return np.concatenate([group.features.entropies for group in groups])[:, ENTROPY_MEANS]
    return np.concatenate([group.rewards for group in groups])[:, None]


def _block_diagonal(blocks: Sequence[Doubles]) -> Doubles:
    whole = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)))
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole
