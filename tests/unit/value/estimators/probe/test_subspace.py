from __future__ import annotations

import numpy as np
import pytest

from poise.value.estimators.probe.subspace import Subspace, affordable_components

WIDTH, WANTED = 300, 6


def parts_of(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + 2].astype(np.float32) for start in range(0, len(rows), 2)]


def random_rows(n: int, seed: int, *, offset: float = 0.0, noise: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = noise * random.normal(size=(n, WIDTH))
    rows[:, :WANTED] += random.normal(size=(n, WANTED)) * np.arange(12, 12 - WANTED, -1)
    return rows + offset


def moments(coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    mean = coordinates.mean(axis=0)
    return (coordinates - mean).T @ (coordinates - mean), mean, len(coordinates)


def slid(subspace: Subspace, rows: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rebuild for rows, replace some by new ones; return the window and the axes [d, k]."""
    coordinates = subspace.rebuild(parts_of(rows))
    subspace.remove(parts_of(rows[: len(new)]), coordinates[: len(new)])
    added = subspace.add(parts_of(new))
    rotation = subspace.rotation(*moments(np.concatenate([coordinates[len(new) :], added])))
    return np.concatenate([rows[len(new) :], new]), subspace.basis @ rotation


def test_residual_is_the_angle_to_the_images() -> None:
    """Old and new rows have other means, to detect sums that are not about the window's own mean."""
    subspace = Subspace(WANTED, 1)
    rows = np.concatenate([random_rows(200, 1, offset=30.5), random_rows(200, 2, offset=30)])
    window, axes = slid(subspace, rows, random_rows(200, 3, offset=29.5))
    images = np.cov(window.T) @ axes
    cosines = (images * axes).sum(axis=0) / np.linalg.norm(images, axis=0)
    assert subspace.residual == pytest.approx(float(np.mean(1 - cosines**2)), rel=1e-2)
    assert subspace.residual > 1e-3


def test_rows_of_the_same_kind_do_not_outdate_a_basis() -> None:
    subspace = Subspace(WANTED, 1)
    slid(subspace, random_rows(400, 1), random_rows(200, 2))
    assert not subspace.outdated


def test_new_rows_outside_the_basis_outdate_it() -> None:
    """The coordinates do not show these directions."""
    subspace = Subspace(WANTED, 1)
    rows = random_rows(400, 1, noise=0.01)
    new = rows[:50].copy()
    new[:, WANTED:] += np.random.default_rng(3).normal(size=(50, WIDTH - WANTED))
    slid(subspace, rows, new)
    assert subspace.outdated


def test_rotating_components_outdate_a_basis() -> None:
    """New rows have hardly more than noise outside the basis, so only the angle shows the change."""
    subspace = Subspace(WANTED, 1)
    new = random_rows(300, 2)
    new[:, 150 : 150 + WANTED] += 0.5 * new[:, :WANTED]
    slid(subspace, random_rows(400, 1), new)
    assert subspace.outdated


def test_components_are_as_exact_far_from_zero_as_near_it() -> None:
    rows = random_rows(400, 1)
    near, far = Subspace(WANTED, 1), Subspace(WANTED, 1)
    _, near_axes = slid(near, rows, random_rows(50, 2))
    _, far_axes = slid(far, rows + 5000, random_rows(50, 2) + 5000)
    cosines = np.abs((near_axes * far_axes).sum(axis=0))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    assert far.residual == pytest.approx(near.residual, rel=1e-2)


def test_a_rebuild_finds_directions_outside_the_old_basis() -> None:
    subspace = Subspace(WANTED, 1)
    rows = np.zeros((200, WIDTH))
    rows[:, :100] = random_rows(200, 1)[:, :100]
    subspace.rebuild(parts_of(rows))
    turned = np.roll(rows, 150, axis=1)
    coordinates = subspace.rebuild(parts_of(turned))
    rotation = subspace.rotation(*moments(coordinates))
    variances = (coordinates @ rotation).var(axis=0)
    np.testing.assert_allclose(variances, np.linalg.eigvalsh(np.cov(turned.T, ddof=0))[::-1][:WANTED], rtol=1e-2)


def test_components_of_rounding_noise_are_left_out() -> None:
    subspace = Subspace(WANTED, 1)
    rows = np.repeat(random_rows(4, 1), 20, axis=0)
    assert subspace.rotation(*moments(subspace.rebuild(parts_of(rows)))).shape[1] == 3


@pytest.mark.parametrize(
    ("num_rows", "rows_per_component", "expected"),
    [(4096, 64, 32), (1024, 64, 16), (256, 64, 4), (64, 64, 4), (3, 64, 2), (4096, 1, 32), (20, 1, 19)],
)
def test_few_rows_have_few_components(num_rows: int, rows_per_component: int, expected: int) -> None:
    assert affordable_components(32, num_rows, rows_per_component) == expected


def test_rows_that_stop_varying_leave_no_component() -> None:
    subspace = Subspace(WANTED, 1)
    subspace.rebuild(parts_of(random_rows(100, 1)))
    coordinates = subspace.rebuild(parts_of(np.full((100, WIDTH), 0.1)))
    assert coordinates.shape == (100, 0)
    assert subspace.basis.shape == (WIDTH, 0)
