"""Curves, crossings, means over seeds and levels, against numbers calculated by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from poise.report.comparison.arithmetic import (
    Curve,
    common_levels,
    crossing,
    describe_spread,
    make_curve,
    mean_curve,
    ratio,
    spread,
    t_quantile,
)


def curve(*points: tuple[float, float]) -> Curve:
    return make_curve(points)


def test_curves_are_sorted_with_the_last_of_equal_x() -> None:
    found = curve((20, 0.5), (0, 0.1), (20, 0.6), (math.nan, 1.0), (10, math.nan))
    assert found.x.tolist() == [0, 20]
    assert found.y.tolist() == [0.1, 0.6]


@pytest.mark.parametrize(
    ("level", "x"),
    [
        (0.2, 0.0),  # where it starts
        (0.1, 0.0),
        (0.3, 50.0),  # a third of the way from 0.2 to 0.5 in 150
        (0.5, 150.0),
        (0.55, None),
    ],
)
def test_a_level_is_reached_between_two_points(level: float, x: float | None) -> None:
    found = crossing(curve((0, 0.2), (150, 0.5), (200, 0.4)), level)
    assert found == (None if x is None else pytest.approx(x))


def test_the_first_of_several_crossings_counts() -> None:
    assert crossing(curve((0, 0), (10, 0.4), (20, 0.2), (30, 0.6)), 0.3) == pytest.approx(7.5)
    assert crossing(curve(), 0.3) is None


def test_the_mean_curve_needs_all_seeds() -> None:
    # At 10 the second lies at 0.2 + 0.4·10/40 = 0.3, at 30 at 0.5; it ends at 40, the first at 30.
    found = mean_curve([curve((0, 0.0), (10, 0.1), (30, 0.7)), curve((0, 0.2), (40, 0.6))])
    assert found is not None
    assert found.curve.x.tolist() == [0, 10, 30]
    np.testing.assert_allclose(found.curve.y, [0.1, 0.2, 0.6])
    np.testing.assert_allclose(found.low, [0.0, 0.1, 0.5])
    np.testing.assert_allclose(found.high, [0.2, 0.3, 0.7])


def test_seeds_without_data_are_ignored() -> None:
    found = mean_curve([curve((0, 0.0), (10, 0.5)), curve()])
    assert found is not None
    assert found.curve.y.tolist() == [0.0, 0.5]
    assert mean_curve([curve()]) is None
    assert mean_curve([curve((0, 1)), curve((5, 1))]) is None  # they have no place in common


def test_the_spread_of_three_seeds_is_students_interval() -> None:
    # Mean 0.4, standard deviation 0.1: 0.4 ± 4.3027·0.1/√3.
    found = spread([0.3, 0.4, 0.5])
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.15159, 0.64841), abs=1e-5)
    assert "95 %" in describe_spread(3)


def test_the_spread_of_two_seeds_is_minimum_and_maximum() -> None:
    found = spread([0.3, 0.5])
    assert (found.mean, found.low, found.high) == (0.4, 0.3, 0.5)
    assert describe_spread(2) == "minimum and maximum of 2 seeds"
    one = spread([0.3])
    assert one.low == one.mean == one.high == 0.3
    assert "one seed" in describe_spread(1)


@pytest.mark.parametrize("num_degrees", [2, 5, 9, 10, 14, 100])
def test_t_quantiles_equal_scipys(num_degrees: int) -> None:
    assert t_quantile(num_degrees) == pytest.approx(stats.t.ppf(0.975, num_degrees), rel=1e-4)


def test_levels_end_at_one_that_all_curves_reach() -> None:
    # Start (0.1 + 0.2) / 2 = 0.15; the lower of the highest points 0.65: steps of 0.1.
    curves = [curve((0, 0.1), (5, 0.65), (9, 0.6)), curve((0, 0.2), (5, 0.9))]
    levels = common_levels(curves)
    assert levels == pytest.approx([0.25, 0.35, 0.45, 0.55, 0.65], abs=0.001)
    assert all(crossing(one, level) is not None for one in curves for level in levels)


def test_there_are_no_levels_if_a_curve_never_rises() -> None:
    assert common_levels([curve((0, 0.1), (5, 0.9)), curve((0, 0.1), (5, 0.05))]) == []
    assert common_levels([curve((0, 0.1)), curve()]) == []


def test_a_ratio_needs_both_and_a_reference_above_zero() -> None:
    assert ratio(3.0, 4.0) == 0.75
    assert ratio(None, 4.0) is ratio(3.0, None) is ratio(3.0, 0.0) is None
