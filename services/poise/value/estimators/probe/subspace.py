"""Updates the leading principal components of one hidden state as the window of rows slides.

Only the product of the window's Gram matrix with a basis is kept. The basis has l ≪ d columns, a few more than
components, so adding or removing a row costs d·l, not d². The best components within the span of the basis follow from
the rows' coordinates (Rayleigh–Ritz). The product is also the next step of subspace iteration. The angle between basis
and product shows how well the basis still fits. A rebuild passes over all rows and starts from the product.

Shapes: n rows, d the model's width, l columns of the basis, k components. Hidden states are far from zero, so an origin
near the rows' mean is subtracted first. Then single precision suffices for products over d. Sums over rows are double.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from poise.value.estimators.features import Doubles, Floats

NEGLIGIBLE_VARIANCE = 1e-10
"""Components with less than this share of the first one's variance are dropped: standardising would amplify noise."""

_FEWEST_COMPONENTS = 4

_OVERSAMPLING = 48
"""Columns of the basis beyond the components. They supply later components and speed up convergence."""
_NUM_FRESH = 8
"""Extra columns that a rebuild takes from the newest rows, to find new directions."""
_EXACT_WIDTH = 128
"""Up to this width the basis spans the whole space, so the components are exact. This takes milliseconds."""
_BLOCK_ROWS = 512
"""Rows multiplied at a time: few enough to stay in the cache between products."""
_CONVERGED = 0.003
"""A rebuild stops when the residual is below this."""
_STALLED = 0.8
"""A rebuild also stops when a pass leaves more than this fraction of the residual: the spectrum is flat."""
_MAX_PASSES = 8
_ROUNDING = 1e-4
"""Share of the variance that rounding may leave outside the basis."""
_OUTDATED_RESIDUAL = 0.05
"""Rebuild when the residual has grown by this much."""
_OUTDATED_OUTSIDE = 2.0
"""Rebuild when the variance of new rows outside the basis is this many times that after the last rebuild."""


def affordable_components(wanted: int, num_rows: int, rows_per_component: int) -> int:
    """Return the number of components for this many rows: more would fit noise.

    One per `rows_per_component` rows, but at least four; at most `wanted` and `num_rows - 1`.
    """
    return min(wanted, max(_FEWEST_COMPONENTS, num_rows // rows_per_component), num_rows - 1)


class Subspace:
    """A basis whose span contains the components of one hidden state, and the sums that update it.

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
        """Passes over all rows in the last rebuild."""
        self._image: Doubles = np.zeros((0, 0))
        self._sum: Doubles = np.zeros(0)
        self._rotation: Doubles = np.zeros((0, 0))
        self._mean: Doubles = np.zeros(0)
        self.residual = 0.0
        """Mean squared sine between the components and their images under the covariance. 0 if the basis contains
        the true components."""
        self._residual_rebuilt = 0.0
        self._outside = self._outside_rebuilt = 0.0

    def fits(self, parts: Sequence[Floats]) -> bool:
        """Whether the basis has the number of columns that these rows need. If not, call `rebuild`."""
        return self.basis.shape == (parts[0].shape[1], self._num_columns(parts))

    @property
    def outdated(self) -> bool:
        """Whether the basis fits the rows clearly worse than after its last rebuild."""
        return (
            self.residual > self._residual_rebuilt + _OUTDATED_RESIDUAL
            or self._outside > _OUTDATED_OUTSIDE * self._outside_rebuilt
        )

    def add(self, parts: Sequence[Floats]) -> Doubles:
        """Add rows. Returns their coordinates about the origin, [n, l], which `remove` needs."""
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
        """Remove rows, given their coordinates from `add`."""
        start = 0
        for block in _blocks(parts):
            block -= self.origin
            self._image -= block.T @ coordinates[start : start + len(block)].astype(np.float32)
            self._sum -= np.ones(len(block), np.float32) @ block
            start += len(block)

    def rotation(self, scatter: Doubles, mean: Doubles, num_rows: int) -> Doubles:
        """Return the components within the span by falling variance, as columns in basis coordinates, [l, k].

        k is the number of affordable components whose variance is not negligible.
        `scatter` [l, l] is the sum of squares of the rows' coordinates about their `mean` [l].

        Raises:
            ArithmeticError: the numbers overflowed.
        """
        if not np.isfinite(scatter).all():
            raise ArithmeticError("the hidden states are too large to fit")
        variances, rotation = np.linalg.eigh(scatter)
        variances, rotation = variances[::-1], rotation[:, ::-1]
        self._rotation, self._mean = rotation, mean
        leading = variances[: affordable_components(self._wanted, num_rows, self._rows_per_component)]
        num_kept = int((leading > NEGLIGIBLE_VARIANCE * variances[:1]).sum())
        lengths = np.linalg.norm(self._images(num_kept), axis=0)
        sines = 1 - np.minimum(1.0, variances[:num_kept] / lengths) ** 2
        self.residual = float(sines.mean()) if num_kept else 0.0
        return rotation[:, :num_kept]

    def rebuild(self, parts: Sequence[Floats]) -> Doubles:
        """Recompute the basis for these rows, starting from the current one; return their coordinates [n, l]."""
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
            if self.residual < _CONVERGED or self.residual > _STALLED * previous:
                break
            start, previous = self._images(self.basis.shape[1]), self.residual
        # If the basis spans the whole space, only rounding errors are outside.
        self._outside_rebuilt = self._outside + _ROUNDING * float(np.trace(scatter)) / len(centred)
        self._residual_rebuilt = self.residual
        return coordinates

    def _start(self, parts: Sequence[Floats]) -> Floats:
        """Return the start of a rebuild, [d, l]: the current basis and the newest rows; random columns at first."""
        num_columns, width = self._num_columns(parts), parts[0].shape[1]
        if num_columns == 0:
            return np.zeros((width, 0), np.float32)
        if self.basis.shape[0] != width or self.basis.shape[1] < num_columns:
            return np.random.default_rng(0).standard_normal((width, num_columns), np.float32)
        newest = np.concatenate(parts[-_NUM_FRESH:])[-min(_NUM_FRESH, num_columns) :] - self.origin
        return np.concatenate([self._images(num_columns - len(newest)), newest.T], axis=1)

    def _images(self, num_columns: int) -> Floats:
        """Return the images of the leading directions within the span, [d, num_columns]."""
        image = (self._image - np.outer(self._sum, self._mean)).astype(np.float32)
        return image @ self._rotation[:, :num_columns].astype(np.float32)

    def _num_columns(self, parts: Sequence[Floats]) -> int:
        if not any(
            (part != parts[0][0]).any() for part in parts
        ):  # all rows are equal: no response went through the model
            return 0
        width = parts[0].shape[1]
        return width if width <= _EXACT_WIDTH else min(self._wanted + _OVERSAMPLING, sum(map(len, parts)) - 1)


def _blocks(parts: Sequence[Floats]) -> Iterator[Floats]:
    """Yield the parts stacked into blocks of about `_BLOCK_ROWS` rows. Each block is a copy."""
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
    """Return an orthonormal basis [d, l] of the columns, filled up with arbitrary directions if they are dependent."""
    if columns.shape[1] == 0:
        return columns
    norms = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(norms > 0, norms, 1)
    try:  # Columns near the components are nearly orthogonal: Cholesky is as exact as QR and several times faster.
        root = np.linalg.cholesky((scaled.T @ scaled).astype(np.float64))
    except np.linalg.LinAlgError:
        return np.linalg.qr(scaled).Q
    if root.diagonal().min() < 0.1:
        return np.linalg.qr(scaled).Q
    basis: Floats = scaled @ np.linalg.inv(root).T.astype(np.float32)
    return basis
