"""Quality of predictions."""

import math

import pytest

from poise.domain.quality import mean_squared_error, pearson


def test_pearson_of_a_perfect_line() -> None:
    assert pearson([0.1, 0.2, 0.3], [1, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize(("predicted", "realised"), [([], []), ([1], [1]), ([1, 1], [0, 1])])
def test_pearson_is_unknown_without_spread(predicted: list[float], realised: list[float]) -> None:
    assert math.isnan(pearson(predicted, realised))


def test_mean_squared_error_by_hand() -> None:
    assert mean_squared_error([0.5, 1], [0, 1]) == pytest.approx(0.125)


def test_mean_squared_error_of_nothing_is_unknown() -> None:
    assert math.isnan(mean_squared_error([], []))
