"""Follows the leading principal components of a window of rows as the window slides.

Owns the numerics of one hidden state. Knows no rewards and no probe. Of the window's Gram matrix only its product with
a basis is kept: with a few columns more than components, l ≪ d, adding or removing a row costs d·l instead of d². The
best components within the basis' span follow from the rows' coordinates in it (Rayleigh–Ritz). The product is the basis
one step of subspace iteration further, which serves twice: the angle between the two says how well the basis still
fits, and a rebuild, which passes over all rows, starts from it.

Shapes: n rows, d the model's width, l columns of the basis, k components. Rows are taken about an origin near their
mean: hidden states lie far from zero, and so single precision is enough for products over d; sums over rows are double.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from poise.value.probe.features import Floats

Doubles = NDArray[np.float64]

NEGLIGIBLE_VARIANCE = 1e-10
"""Of a component, as a share of the first one's: below it is rounding noise, which standardising would blow up."""

_FEWEST_COMPONENTS = 4

_NUM_SPARE = 48
"""Columns of the basis beyond the components: the next components come from there, and convergence is faster."""
_NUM_FRESH = 8
"""Of those, at a rebuild, directions of the newest rows, so that what was never seen before is found."""
_EXACT_WIDTH = 128
"""Up to it the basis spans everything, and the components are exact: their whole eigenproblem takes milliseconds."""
_BLOCK_ROWS = 512
"""Rows multiplied at a time: few enough to stay in the cache between their products."""
_CONVERGED = 0.003
"""Misfit at which a rebuild needs no further pass."""
_STALLED = 0.8
"""A pass that leaves more than this share of the misfit is the last: the spectrum is flat, and no basis is better."""
_MAX_PASSES = 8
_ROUNDING = 1e-4
"""Share of the variance."""
_OUTDATED_MISFIT = 0.05
"""Rebuild when the misfit has grown by so much."""
_OUTDATED_OUTSIDE = 2.0
"""Rebuild when new rows have so many times as much outside the basis as the rows had that it was made for."""


def affordable_components(wanted: int, num_rows: int, rows_per_component: int) -> int:
    """Return how many components so many rows can bear: more would fit their noise.

    One for every `rows_per_component` rows, but four in any case, capped by `wanted` and by the rows themselves.
    """
    return min(wanted, max(_FEWEST_COMPONENTS, num_rows // rows_per_component), num_rows - 1)


class Subspace:
    """A basis that holds the components of one hidden state, and what it takes to move it.

    Deterministic: the same sequence of calls gives the same results.
    """

    def __init__(self, num_components: int, rows_per_component: int) -> None:
        self._wanted = num_components
        self._rows_per_component = rows_per_component
        self.origin: Floats = np.zeros(0, np.float32)
        """[d]"""
        self.basis: Floats = np.zeros((0, 0), np.float32)
        """[d, l], orthonormal."""
        self.num_passes = 0
        """Over all rows, in the last rebuild."""
        self._image: Doubles = np.zeros((0, 0))
        self._sum: Doubles = np.zeros(0)
        self._rotation: Doubles = np.zeros((0, 0))
        self._mean: Doubles = np.zeros(0)
        self.misfit = 0.0
        """Mean squared sine between the components and their images under the covariance: 0 if they are the rows' own,
        and not only the best within the basis."""
        self._misfit_rebuilt = 0.0
        self._outside = self._outside_rebuilt = 0.0

    def fits(self, parts: Sequence[Floats]) -> bool:
        """Whether the basis has as many columns as these parts of a window ask for: else, rebuild."""
        return self.basis.shape == (parts[0].shape[1], self._num_columns(parts))

    @property
    def outdated(self) -> bool:
        """Whether the basis fits the rows clearly worse than it did after its rebuild."""
        return (
            self.misfit > self._misfit_rebuilt + _OUTDATED_MISFIT
            or self._outside > _OUTDATED_OUTSIDE * self._outside_rebuilt
        )

    def add(self, parts: Sequence[Floats]) -> Doubles:
        """Take in rows. Returns their coordinates about the origin, [n, l], which `remove` wants back."""
        outside, found = 0.0, [np.zeros((0, self.basis.shape[1]), np.float32)]
        for block in _blocks(parts):
            block -= self.origin
            coordinates = block @ self.basis
            self._image += block.T @ coordinates
            self._sum += np.ones(len(block), np.float32) @ block
            outside += float(np.vdot(block, block)) - float(np.vdot(coordinates, coordinates))
            found.append(coordinates)
        stacked = np.concatenate(found)
        self._outside = max(outside, 0.0) / max(len(stacked), 1)
        return stacked.astype(np.float64)

    def remove(self, parts: Sequence[Floats], coordinates: Doubles) -> None:
        """Take out rows."""
        start = 0
        for block in _blocks(parts):
            block -= self.origin
            self._image -= block.T @ coordinates[start : start + len(block)].astype(np.float32)
            self._sum -= np.ones(len(block), np.float32) @ block
            start += len(block)

    def rotation(self, scatter: Doubles, mean: Doubles, num_rows: int) -> Doubles:
        """Return the components within the span, of falling variance: columns of the basis' coordinates, [l, k].

        They are as many as wanted and affordable, less those of negligible variance: none if nothing varies.
        `scatter` [l, l] is the sum of squares of the rows' coordinates about their `mean` [l].

        Raises:
            ArithmeticError: the numbers overflowed.
        """
        if not np.isfinite(scatter).all():
            raise ArithmeticError("the hidden states are too large to be fitted")
        variances, rotation = np.linalg.eigh(scatter)
        variances, rotation = variances[::-1], rotation[:, ::-1]
        self._rotation, self._mean = rotation, mean
        leading = variances[: affordable_components(self._wanted, num_rows, self._rows_per_component)]
        num_kept = int((leading > NEGLIGIBLE_VARIANCE * variances[:1]).sum())
        lengths = np.linalg.norm(self._further(num_kept), axis=0)
        sines = 1 - np.minimum(1.0, variances[:num_kept] / lengths) ** 2
        self.misfit = float(sines.mean()) if num_kept else 0.0
        return rotation[:, :num_kept]

    def rebuild(self, parts: Sequence[Floats]) -> Doubles:
        """Make the basis anew for these rows, from the one so far, and return their coordinates [n, l]."""
        start, previous = self._start(parts), np.inf
        self.origin = _mean(parts)
        for self.num_passes in range(1, _MAX_PASSES + 1):
            self.basis = _orthonormal(start)
            self._image, self._sum = np.zeros(self.basis.shape), np.zeros(len(self.origin))
            coordinates = self.add(parts)
            mean = coordinates.mean(axis=0)
            centred = coordinates - mean
            scatter = centred.T @ centred
            self.rotation(scatter, mean, len(centred))
            if self.misfit < _CONVERGED or self.misfit > _STALLED * previous:
                break
            start, previous = self._further(self.basis.shape[1]), self.misfit
        # Where the basis spans everything, what is outside is rounding.
        self._outside_rebuilt = self._outside + _ROUNDING * float(np.trace(scatter)) / len(centred)
        self._misfit_rebuilt = self.misfit
        return coordinates

    def _start(self, parts: Sequence[Floats]) -> Floats:
        """Return what to start a rebuild from, [d, l]: the basis so far and the newest rows, or anything at first."""
        num_columns, width = self._num_columns(parts), parts[0].shape[1]
        if num_columns == 0:
            return np.zeros((width, 0), np.float32)
        if self.basis.shape[0] != width or self.basis.shape[1] < num_columns:
            return np.random.default_rng(0).standard_normal((width, num_columns), np.float32)
        newest = np.concatenate(parts[-_NUM_FRESH:])[-min(_NUM_FRESH, num_columns) :] - self.origin
        return np.concatenate([self._further(num_columns - len(newest)), newest.T], axis=1)

    def _further(self, num_columns: int) -> Floats:
        """Return the images of the leading components, and of what follows them within the span, [d, num_columns]."""
        image = (self._image - np.outer(self._sum, self._mean)).astype(np.float32)
        return image @ self._rotation[:, :num_columns].astype(np.float32)

    def _num_columns(self, parts: Sequence[Floats]) -> int:
        if not any((part != parts[0][0]).any() for part in parts):  # as when no response went through the model
            return 0
        width = parts[0].shape[1]
        return width if width <= _EXACT_WIDTH else min(self._wanted + _NUM_SPARE, sum(map(len, parts)) - 1)


def _blocks(parts: Sequence[Floats]) -> Iterator[Floats]:
    """Stack the parts in blocks of about `_BLOCK_ROWS` rows, each a copy of its own."""
    pending: list[Floats] = []
    num_pending = 0
    for part in parts:
        pending.append(part)
        num_pending += len(part)
        if num_pending >= _BLOCK_ROWS:
            yield np.concatenate(pending)
            pending, num_pending = [], 0
    if pending:
        yield np.concatenate(pending)


def _mean(parts: Sequence[Floats]) -> Floats:
    total = np.zeros(parts[0].shape[1])
    for block in _blocks(parts):
        total += np.ones(len(block), np.float32) @ block
    return (total / sum(map(len, parts))).astype(np.float32)


def _orthonormal(columns: Floats) -> Floats:
    """Return an orthonormal basis [d, l] of the columns, completed by any directions where they are dependent."""
    if columns.shape[1] == 0:
        return columns
    norms = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(norms > 0, norms, 1)
    try:  # Columns near the components are near orthogonal, and then this is as exact as QR and several times faster.
        root = np.linalg.cholesky((scaled.T @ scaled).astype(np.float64))
    except np.linalg.LinAlgError:
        return np.linalg.qr(scaled).Q
    if root.diagonal().min() < 0.1:
        return np.linalg.qr(scaled).Q
    basis: Floats = scaled @ np.linalg.inv(root).T.astype(np.float32)
    return basis
