from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tests.support.reference_probe import ReferenceFitter
from threadpoolctl import threadpool_limits

from poise.value.estimators.features import ENTROPY_MEANS, NUM_ENTROPIES, FeatureMatrix
from poise.value.estimators.probe.model import FittedProbe, row_products

ALL_INPUTS = ("prompt_hidden", "response_hidden", "entropy")


def random_rows(n: int, width: int, seed: int = 0) -> FeatureMatrix:
    random = np.random.default_rng(seed)
    return FeatureMatrix(
        random.normal(3, 2, (n, width)).astype(np.float32),
        random.normal(-1, 5, (n, width)).astype(np.float32),
        random.gamma(1, 1, (n, NUM_ENTROPIES)).astype(np.float32),
    )


def rewards_of(rows: FeatureMatrix) -> np.ndarray:
    return (1 / (1 + np.exp(-(rows.prompt_hidden[:, 0] - 3)))).astype(np.float32)


def fitter(**changes: object) -> ReferenceFitter:
    settings = {"inputs": ALL_INPUTS, "prompt_components": 32, "response_components": 64, "alpha": 100.0}
    return ReferenceFitter(**settings | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_predictions_are_those_of_the_reference_pipeline(alpha: float) -> None:
    train, unseen = random_rows(400, 90), random_rows(50, 90, seed=1)
    targets = rewards_of(train)

    prompt = PCA(32, random_state=0).fit(train.prompt_hidden)
    response = PCA(64, random_state=0).fit(train.response_hidden)

    def derive(rows: FeatureMatrix) -> np.ndarray:
        return np.hstack(
            [
                prompt.transform(rows.prompt_hidden),
                response.transform(rows.response_hidden),
                rows.entropies[:, [0, 4, 8]],
            ]
        ).astype(np.float64)

    scaler = StandardScaler().fit(derive(train))
    ridge = Ridge(alpha=alpha).fit(scaler.transform(derive(train)), targets)
    expected = np.clip(ridge.predict(scaler.transform(derive(unseen))), 0, 1)

    fitted = fitter(alpha=alpha).fit(train, targets)
    np.testing.assert_allclose(fitted.predict(unseen), expected, atol=2e-5)
    assert np.ptp(expected) > 0.05  # the predictions vary, so the comparison is meaningful


def test_the_siblings_reward_is_another_standardised_column() -> None:
    random = np.random.default_rng(3)
    train, unseen = (
        replace(random_rows(n, 40, seed=n), rewards=random.uniform(size=n).astype(np.float32)) for n in (300, 50)
    )
    targets = (0.5 * rewards_of(train) + 0.5 * train.rewards).astype(np.float32)

    def derive(rows: FeatureMatrix) -> np.ndarray:
        return np.column_stack([rows.entropies[:, ENTROPY_MEANS], rows.rewards]).astype(np.float64)

    scaler = StandardScaler().fit(derive(train))
    ridge = Ridge(alpha=1.0).fit(scaler.transform(derive(train)), targets)
    expected = np.clip(ridge.predict(scaler.transform(derive(unseen))), 0, 1)

    fitted = fitter(inputs=("entropy", "sibling_reward"), alpha=1.0).fit(train, targets)
    np.testing.assert_allclose(fitted.predict(unseen), expected, atol=1e-6)
    assert fitted.needs_rewards
    assert fitted.width is None
    assert np.ptp(expected) > 0.3


def test_a_probe_that_needs_rewards_rejects_rows_without() -> None:
    train = random_rows(30, 4)
    with_rewards = replace(train, rewards=rewards_of(train))
    fitted = fitter(inputs=("entropy", "sibling_reward")).fit(with_rewards, rewards_of(train))
    with pytest.raises(ValueError, match="sibling_reward"):
        fitted.predict(train)
    assert not fitter().fit(with_rewards, rewards_of(train)).needs_rewards


def test_the_prompt_only_probe_is_fitted_to_the_prompt() -> None:
    train, unseen = random_rows(400, 90), random_rows(50, 90, seed=1)
    targets = rewards_of(train)
    prompt_only = fitter(alpha=1.0).fit(train, targets).prompt_only
    separate = fitter(alpha=1.0, inputs=("prompt_hidden",)).fit(train, targets)
    assert prompt_only is not None
    values = prompt_only.predict(unseen.prompt_hidden)
    np.testing.assert_allclose(values, separate.predict(unseen), atol=1e-6)
    assert np.ptp(values) > 0.3
    one_by_one = [prompt_only.predict(unseen.prompt_hidden[i : i + 1]) for i in range(50)]
    assert np.concatenate(one_by_one).tobytes() == values.tobytes()
    assert prompt_only.predict(100 * unseen.prompt_hidden).min() == 0.0
    assert prompt_only.predict(100 * unseen.prompt_hidden).max() == 1.0


def test_without_prompt_hidden_there_is_no_prompt_only_probe() -> None:
    train = random_rows(50, 8)
    assert fitter(inputs=("response_hidden", "entropy")).fit(train, rewards_of(train)).prompt_only is None


def test_values_are_clipped_to_the_unit_interval() -> None:
    train = random_rows(200, 4)
    fitted = fitter(alpha=1e-3).fit(train, rewards_of(train))
    extreme = FeatureMatrix(train.prompt_hidden * 100, train.response_hidden, train.entropies)
    values = fitted.predict(extreme)
    assert values.dtype == np.float32
    assert (values.min(), values.max()) == (0.0, 1.0)


@pytest.mark.parametrize("width", [3, 300, 20001])
def test_a_row_has_the_same_value_to_the_bit_in_any_batch(width: int) -> None:
    rows, random = random_rows(50, width), np.random.default_rng(2)
    weights = {name: random.normal(0, 0.02 / width**0.5, width) for name in ("prompt_hidden", "response_hidden")}
    fitted = FittedProbe(weights | {"entropy": random.normal(0, 0.02, 3)}, 0.5)
    together = fitted.predict(rows)
    separate = np.concatenate([fitted.predict(rows.part(i, i + 1)) for i in range(len(rows))])
    sevens = np.concatenate([fitted.predict(rows.part(i, i + 7)) for i in range(0, len(rows), 7)])
    assert together.tobytes() == separate.tobytes() == sevens.tobytes()
    assert len(np.unique(together)) > 40  # few were clipped


def test_wide_rows_have_the_same_sum_with_any_threads() -> None:
    random = np.random.default_rng(0)
    columns, weights = random.normal(0, 100, (5, 20001)).astype(np.float32), random.normal(size=20001)
    products = []
    for limit in (1, 2):
        with threadpool_limits(limit):
            products.append(row_products(columns, weights))
    products.append(np.concatenate([row_products(row[None], weights) for row in columns]))
    assert products[0].tobytes() == products[1].tobytes() == products[2].tobytes()
    exact = [math.fsum(row.astype(np.float64) * weights) for row in columns]
    np.testing.assert_allclose(products[0], exact, rtol=0, atol=1e-14 * np.abs(columns * weights).sum(axis=1).max())


def test_the_order_of_stored_inputs_does_not_change_values() -> None:
    # Added up from left to right, 1e17 − 1e17 + 0.25 is 0.25 and 0.25 + 1e17 − 1e17 is 0.
    weights = {"prompt_hidden": np.array([1e17]), "response_hidden": np.array([-1e17]), "entropy": np.full(3, 0.25 / 3)}
    rows = FeatureMatrix(*(np.ones((1, columns), np.float32) for columns in (1, 1, NUM_ENTROPIES)))
    values = {FittedProbe(dict(order), 0.0).predict(rows).tobytes() for order in permutations(weights.items())}
    assert len(values) == 1


def test_fitting_again_gives_the_same_parameters() -> None:
    train = random_rows(600, 520)  # large enough that scikit-learn would pick a randomised solver
    one, two = (fitter().fit(train, rewards_of(train)) for _ in range(2))
    assert all(np.array_equal(one.arrays()[name], two.arrays()[name]) for name in one.arrays())


def test_parameters_survive_storing_as_plain_arrays() -> None:
    rows = random_rows(100, 8)
    train = replace(rows, rewards=rewards_of(rows)[::-1])
    for inputs in (ALL_INPUTS, ("response_hidden", "sibling_reward")):
        fitted = fitter(inputs=inputs).fit(train, rewards_of(train))
        arrays = fitted.arrays()
        assert all(type(array) is np.ndarray and array.dtype == np.float64 for array in arrays.values())
        again = FittedProbe.from_arrays(arrays)
        assert again.predict(train).tobytes() == fitted.predict(train).tobytes()
        assert (again.width, again.needs_rewards) == (8, inputs != ALL_INPUTS)
        if fitted.prompt_only is None:
            assert again.prompt_only is None
        else:
            prompts = train.prompt_hidden
            assert again.prompt_only.predict(prompts).tobytes() == fitted.prompt_only.predict(prompts).tobytes()


def test_only_the_chosen_inputs_matter() -> None:
    train, other = random_rows(100, 8), random_rows(100, 8, seed=9)
    fitted = fitter(inputs=("entropy",)).fit(train, rewards_of(train))
    assert fitted.width is None
    swapped = FeatureMatrix(other.prompt_hidden, other.response_hidden, train.entropies)
    assert np.array_equal(fitted.predict(swapped), fitted.predict(train))
    assert set(fitted.weights) == {"entropy"}
    assert fitted.weights["entropy"].size == len(ENTROPY_MEANS)


@pytest.mark.parametrize(("n", "width"), [(2, 50), (3, 1), (5, 2000), (40, 3)])
def test_fewer_rows_or_columns_than_components_still_fit(n: int, width: int) -> None:
    train = random_rows(n, width)
    values = fitter().fit(train, rewards_of(train)).predict(train)
    assert np.isfinite(values).all()


def test_a_shared_prompt_does_not_amplify_rounding_noise() -> None:
    """4 prompts of 8 siblings have 3 directions; a 4th component would be amplified noise."""
    distinct = random_rows(4, 64)
    train = random_rows(32, 64)
    train = FeatureMatrix(np.repeat(distinct.prompt_hidden, 8, axis=0), train.response_hidden, train.entropies)
    targets = np.repeat(np.array([0.1, 0.9, 0.3, 0.7], np.float32), 8)
    fitted = fitter(inputs=("prompt_hidden",), alpha=1e-6).fit(train, targets)
    np.testing.assert_allclose(fitted.predict(train), targets, atol=1e-4)
    nudged = FeatureMatrix(train.prompt_hidden * np.float32(1 + 1e-5), train.response_hidden, train.entropies)
    np.testing.assert_allclose(fitted.predict(nudged), targets, atol=1e-3)


def test_inputs_that_never_vary_are_left_out() -> None:
    train = random_rows(50, 8)
    constant = FeatureMatrix(train.prompt_hidden, np.zeros_like(train.response_hidden), train.entropies)
    fitted = fitter().fit(constant, rewards_of(train))
    assert not fitted.weights["response_hidden"].any()
    assert np.array_equal(fitted.predict(train), fitted.predict(constant))


def test_if_nothing_varies_the_value_is_the_mean_reward() -> None:
    train = FeatureMatrix(np.ones((4, 3), np.float32), np.zeros((4, 3), np.float32), np.ones((4, 12), np.float32))
    targets = np.array([0, 0, 0, 1], np.float32)
    np.testing.assert_allclose(fitter().fit(train, targets).predict(train), 0.25, atol=1e-6)
    hidden_only = fitter(inputs=("prompt_hidden",)).fit(train, targets)
    np.testing.assert_allclose(hidden_only.predict(train), 0.25, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_overflow_are_rejected() -> None:
    train = random_rows(20, 8)
    huge = FeatureMatrix(train.prompt_hidden * np.float32(1e38), train.response_hidden, train.entropies)
    with pytest.raises((ArithmeticError, ValueError)):
        fitter().fit(huge, rewards_of(train))
