from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.reference_probe import ReferenceFitter, training_data
from tests.unit.value.harness import saved_and_read

from poise.value.dedup import DedupSnapshot
from poise.value.estimators.features import NUM_ENTROPIES, FeatureMatrix, Label
from poise.value.estimators.probe.incremental import IncrementalFitter
from poise.value.estimators.probe.model import FittedProbe
from poise.value.store import DomainSnapshot, Snapshot

ALL_INPUTS = ("prompt_hidden", "response_hidden", "entropy")


class Source:
    """Groups whose hidden states are near a few directions, far from zero; the rewards depend on them."""

    def __init__(self, width: int = 400, rank: int = 12, noise: float = 0.01, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.width = width
        self.noise = noise
        self.turn(rank)

    def turn(self, rank: int) -> None:
        """Draw new directions."""
        self.directions = (
            np.linalg.qr(self.random.normal(size=(self.width, rank))).Q.T * np.geomspace(8, 1, rank)[:, None]
        )

    def group(self, n: int = 2) -> Label:
        def hidden(latent: np.ndarray) -> np.ndarray:
            noise = self.noise * self.random.normal(size=(n, self.width))
            return (20 + latent @ self.directions + noise).astype(np.float32)

        prompt, response = self.random.normal(size=(2, n, len(self.directions)))
        rows = FeatureMatrix(
            hidden(np.repeat(prompt[:1], n, axis=0)),
            hidden(response),
            self.random.gamma(1, 1, (n, NUM_ENTROPIES)).astype(np.float32),
        )
        rewards = 1 / (1 + np.exp(-prompt[0, 0] - response[:, 0]))
        return Label("run", 0, f"g{self.random.integers(1 << 60)}", "d", rows, rewards.astype(np.float32))

    def groups(self, num: int, n: int = 2) -> list[Label]:
        return [self.group(n) for _ in range(num)]


def fitter(**changes: object) -> IncrementalFitter:
    return IncrementalFitter(
        **{"inputs": ALL_INPUTS, "prompt_components": 12, "response_components": 12, "alpha": 1.0} | changes
    )  # type: ignore[arg-type]


def reference(groups: Iterable[Label], **changes: object) -> FittedProbe:
    configured = {"inputs": ALL_INPUTS, "prompt_components": 12, "response_components": 12, "alpha": 1.0} | changes
    rows, targets = training_data(groups)
    # Doubles: scikit-learn computes covariances about zero, which is too coarse in single precision far from zero.
    doubles = replace(
        rows,
        prompt_hidden=rows.prompt_hidden.astype(float),  # type: ignore[arg-type]
        response_hidden=rows.response_hidden.astype(float),  # type: ignore[arg-type]
    )
    return ReferenceFitter(**configured).fit(doubles, targets)  # type: ignore[arg-type]


def assert_alike(fitted: FittedProbe, expected: FittedProbe, groups: list[Label], atol: float) -> None:
    rows, _ = training_data(groups)
    np.testing.assert_allclose(fitted.predict(rows), expected.predict(rows), atol=atol)
    if expected.prompt_only is None:
        assert fitted.prompt_only is None
        return
    values = [each.prompt_only.predict(rows.prompt_hidden) for each in (fitted, expected)]  # type: ignore[union-attr]
    np.testing.assert_allclose(*values, atol=atol)


@pytest.mark.parametrize(
    "inputs",
    [
        ALL_INPUTS,
        (*ALL_INPUTS, "sibling_reward"),
        ("sibling_reward", "response_hidden", "prompt_hidden"),
        ("entropy", "response_hidden"),
        ("prompt_hidden",),
        ("entropy",),
        ("sibling_reward",),
    ],
)
def test_a_first_fit_predicts_like_the_reference(inputs: tuple[str, ...]) -> None:
    source = Source()
    groups, unseen = source.groups(150), source.groups(50)
    assert_alike(fitter(inputs=inputs).fit(groups), reference(groups, inputs=inputs), unseen, atol=2e-4)


def test_a_growing_window_gets_more_components() -> None:
    source, filling = Source(), fitter(rows_per_component=40)
    groups, unseen = source.groups(50), source.groups(50)
    for num_components in (4, 5, 10, 12):  # of 100, 200, 400 and 800 rows
        expected = reference(groups, prompt_components=num_components, response_components=num_components)
        assert_alike(filling.fit(groups), expected, unseen, atol=5e-4)
        assert_alike(reference(groups, rows_per_component=40), expected, unseen, atol=1e-6)
        groups = groups + source.groups(len(groups))


@pytest.mark.parametrize("inputs", [ALL_INPUTS, ("response_hidden", "sibling_reward", "prompt_hidden")])
def test_fifty_updates_predict_like_the_reference(inputs: tuple[str, ...]) -> None:
    """Wider than the exact solution, so that bases are updated in single precision."""
    source, sliding = Source(), fitter(inputs=inputs)
    groups, unseen = source.groups(120), source.groups(50)
    num_rebuilds = 0
    for update in range(50):
        fitted = sliding.fit(groups)
        num_rebuilds += sliding.num_fits_since_rebuild == 0
        if update % 7 == 0 or update == 49:
            assert_alike(fitted, reference(groups, inputs=inputs), unseen, atol=5e-4)
        groups = groups[10:] + source.groups(10)
    assert 4 <= num_rebuilds <= 6  # 12 updates replace the window


def test_sums_after_a_hundred_updates_equal_those_of_a_rebuild() -> None:
    """Groups leave and return, so the window stays the same and needs no rebuild."""
    source, sliding = Source(), fitter()
    groups, others = source.groups(400), source.groups(3)
    sliding.fit(groups)
    for _ in range(50):
        sliding.fit(groups[3:] + others)
        fitted = sliding.fit(groups)
    assert sliding.num_fits_since_rebuild == 100
    fresh = fitter().fit(groups)
    for name, weights in fresh.weights.items():
        np.testing.assert_allclose(fitted.weights[name], weights, atol=1e-4 * np.abs(weights).max())


def test_random_rows_of_few_columns_are_fitted_exactly() -> None:
    """All directions are alike, so only the whole basis gives the reference's components."""
    source, sliding = Source(width=80, rank=80, noise=5.0), fitter()
    groups, unseen = source.groups(300, n=3), source.groups(50)
    for _ in range(5):
        assert_alike(sliding.fit(groups), reference(groups), unseen, atol=2e-3)
        groups = groups[40:] + source.groups(40, n=3)


def test_new_directions_are_found_in_one_update() -> None:
    source, sliding = Source(rank=6), fitter()
    groups = source.groups(200)
    sliding.fit(groups)
    source.turn(rank=6)
    groups = groups[60:] + source.groups(60)
    fitted = sliding.fit(groups)
    assert sliding.num_fits_since_rebuild == 0
    assert_alike(fitted, reference(groups), source.groups(50), atol=2e-3)


def test_the_same_fits_give_the_same_probes() -> None:
    def fits() -> list[FittedProbe]:
        source, sliding = Source(), fitter()
        first = source.groups(60)
        return [sliding.fit(first), sliding.fit(first[5:] + source.groups(5))]

    for one, other in zip(fits(), fits(), strict=True):
        assert all(np.array_equal(array, other.arrays()[name]) for name, array in one.arrays().items())


def test_a_new_fitter_continues_after_a_restart() -> None:
    source, sliding = Source(), fitter()
    groups, unseen = source.groups(120), source.groups(50)
    for _ in range(5):
        fitted = sliding.fit(groups)
        before, groups = groups, groups[8:] + source.groups(8)
    assert_alike(fitter().fit(before), fitted, unseen, atol=2e-4)


@pytest.mark.parametrize("width", [64, 400])
def test_a_fresh_fit_is_the_same_after_a_restart(width: int) -> None:
    source, kept = Source(width), fitter(incremental=False)
    groups, unseen = source.groups(60), FeatureMatrix.concatenate([group.features for group in source.groups(50)])
    for _ in range(4):
        groups = groups[4:] + source.groups(4)
        fitted, first = kept.fit(groups), fitter(incremental=False).fit(restored(groups))
        assert fitted.bias == first.bias
        assert all(np.array_equal(array, first.arrays()[name]) for name, array in fitted.arrays().items())
        assert fitted.predict(unseen).tobytes() == first.predict(unseen).tobytes()


def restored(groups: list[Label]) -> list[Label]:
    """Return the groups as loaded from the store."""
    domain = DomainSnapshot("d", tuple(groups), len(groups), 1, None)
    return list(saved_and_read(Snapshot("id", (domain,), DedupSnapshot(), (), 0, 0)).domains[0].groups)


@pytest.mark.parametrize(("num_groups", "width"), [(1, 300), (1, 5), (2, 1), (5, 2000), (40, 3)])
def test_fewer_rows_or_columns_than_components_still_fit(num_groups: int, width: int) -> None:
    source, sliding = Source(width=width, rank=1), fitter()
    groups = source.groups(num_groups)
    assert_alike(sliding.fit(groups), reference(groups), groups, atol=1e-3)
    groups = [*groups, source.group()]
    assert_alike(sliding.fit(groups), reference(groups), groups, atol=1e-3)


def without_responses(group: Label) -> Label:
    constant = np.full_like(group.features.response_hidden, 0.1)
    return replace(group, features=replace(group.features, response_hidden=constant))


def test_inputs_that_never_vary_are_left_out_until_they_do() -> None:
    source, sliding = Source(), fitter()
    constant, varying = [without_responses(group) for group in source.groups(50)], source.groups(50)
    assert not sliding.fit(constant).weights["response_hidden"].any()
    assert_alike(sliding.fit(constant[25:] + varying), reference(constant[25:] + varying), varying, atol=5e-4)
    assert not sliding.fit(constant).weights["response_hidden"].any()


def test_if_nothing_varies_the_value_is_the_mean_reward() -> None:
    rows = FeatureMatrix(np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), np.full((2, 12), 0.3, np.float32))
    groups = [Label("r", 0, str(reward), "d", rows, np.float32([reward, reward])) for reward in (0, 0, 0, 1)]
    for inputs in (ALL_INPUTS, ("prompt_hidden",)):
        np.testing.assert_allclose(fitter(inputs=inputs).fit(groups).predict(rows), 0.25, atol=1e-6)


def test_a_shared_prompt_does_not_amplify_rounding_noise() -> None:
    """4 prompts have 3 directions; a 4th component would be amplified noise."""
    source = Source(noise=0.0)
    groups = source.groups(4, n=8)
    assert_alike(fitter(alpha=1e-6).fit(groups), reference(groups, alpha=1e-6), groups, atol=2e-3)


def test_a_fit_that_overflows_fails_and_resets_the_fitter() -> None:
    source, sliding = Source(), fitter()
    groups = source.groups(60)
    sliding.fit(groups)
    rows = FeatureMatrix(*(np.full((2, width), 3e38, np.float32) for width in (400, 400, NUM_ENTROPIES)))
    bad = Label("run", 0, "bad", "d", rows, np.float32([0, 1]))
    with pytest.raises((ArithmeticError, ValueError)):
        sliding.fit([*groups, bad])
    assert_alike(sliding.fit(groups), fitter().fit(groups), groups, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_of_windows_predicts_like_the_reference(data: st.DataObject) -> None:
    source = Source(width=data.draw(st.integers(1, 12)), rank=1, noise=1.0, seed=data.draw(st.integers(0, 99)))
    pool = [source.group(n) for n in data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=12))]
    # The maximum number of components: among nearly equal ones, the choice would be arbitrary.
    sliding = fitter()
    for _ in range(data.draw(st.integers(1, 6))):
        groups = data.draw(st.lists(st.sampled_from(pool), min_size=1, unique_by=id))
        assert_alike(sliding.fit(groups), reference(groups), pool, atol=2e-3)
