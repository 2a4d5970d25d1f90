"""Quality of reward predictions."""

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from poise.algorithms.prediction_quality import (
    CalibrationBin,
    bias,
    brier_skill,
    calibration,
    mean_squared_error,
    pearson,
    share_clipped,
)


def test_pearson_of_a_perfect_line() -> None:
    assert pearson([0.1, 0.2, 0.3], [1, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize(("predicted", "realised"), [([], []), ([1], [1]), ([1, 1], [0, 1])])
def test_pearson_is_nan_without_variation(predicted: list[float], realised: list[float]) -> None:
    assert math.isnan(pearson(predicted, realised))


def test_mean_squared_error_by_hand() -> None:
    assert mean_squared_error([0.5, 1], [0, 1]) == pytest.approx(0.125)


def test_mean_squared_error_of_no_rows_is_nan() -> None:
    assert math.isnan(mean_squared_error([], []))


def test_brier_skill_is_1_when_perfect_and_0_if_constant() -> None:
    assert brier_skill([0, 1, 1], [0, 1, 1]) == 1
    assert brier_skill([2 / 3] * 3, [0, 1, 1]) == pytest.approx(0)
    assert brier_skill([1, 0, 0], [0, 1, 1]) == pytest.approx(1 - 1 / (2 / 9))


@pytest.mark.parametrize("realised", [[], [1, 1]])
def test_brier_skill_needs_variation(realised: list[float]) -> None:
    assert math.isnan(brier_skill(realised, realised))


def test_bias_is_positive_for_optimistic_predictions() -> None:
    assert bias([1, 0.5], [0.5, 0.5]) == pytest.approx(0.25)
    assert math.isnan(bias([], []))


def test_values_at_the_bounds_count_as_clipped() -> None:
    assert share_clipped([0, 1e-6, 0.5, 1]) == 0.5
    assert math.isnan(share_clipped([]))


def test_calibration_bins_have_mean_prediction_and_reward() -> None:
    predicted, realised = np.array([0.02, 0.04, 0.55, 1.0]), np.array([0.0, 1.0, 1.0, 0.5])
    assert calibration(predicted, realised) == [
        CalibrationBin(pytest.approx(0.03), 0.5, 2),
        CalibrationBin(0.55, 1.0, 1),
        CalibrationBin(1.0, 0.5, 1),
    ]


def test_calibration_bins_equal_scikit_learns() -> None:
    random = np.random.default_rng(0)
    predicted = random.random(500)
    realised = (random.random(500) < predicted).astype(int)
    share, mean = calibration_curve(realised, predicted, n_bins=10)
    bins = calibration(predicted, realised)
    assert [one.realised for one in bins] == pytest.approx(share.tolist())
    assert [one.predicted for one in bins] == pytest.approx(mean.tolist())
